"""Plots of what performance.py has measured: `plots.py RESULTS FOLDER` draws a PNG for each file that is there.

It runs in an environment of its own that has matplotlib (`./dev bench peers plots`), and imports nothing else of ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

INK, OURS, OTHERS = "#222222", "#1f5fa8", "#b9bec6"
SHADES = ("#1f5fa8", "#7aa6d6", "#c98a2b", "#8a8f98", "#4d9a6a")
Axes = Any


def main() -> None:
    results, folder = map(Path, sys.argv[1:3])
    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": INK,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "figure.dpi": 130,
            "legend.frameon": False,
        }
    )
    for name, draw in PLOTS.items():
        path = results / f"{name}.json"
        if path.is_file():
            figure = draw(json.loads(path.read_text()))
            figure.savefig(folder / f"performance-{name}.png", bbox_inches="tight")
            pyplot.close(figure)


def _compare(record: Mapping[str, Any]) -> Any:
    """Tokens a second of everyone, a panel for each kind of texts."""
    figure, panels = pyplot.subplots(1, len(record), figsize=(4.2 * len(record), 3.2), squeeze=False)
    names: list[str] = []
    for axes, (lengths, one) in zip(panels[0], record.items(), strict=True):
        rates = {
            f"{each['kind']} {each['dtype']}": one["tokens"]
            / median(turn["seconds"] for turn in each["turns"])
            for each in one["contestants"]
        }
        names = names or sorted(rates, key=rates.__getitem__)
        values = [rates[name] for name in names]
        colours = [OURS if name.startswith("carpool") else OTHERS for name in names]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
        axes.margins(x=0.2)
        axes.set_title(f"{lengths} texts, tokens/s")
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        if axes is not panels[0][0]:
            axes.yaxis.set_visible(False)
    return figure


def _kernels(record: Mapping[str, Any]) -> Any:
    """Attention's rate by length, ours and torch's, and the peak it could reach."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8.4, 3.2))
    bounds = {
        "bfloat16": max(record["peaks"]["one"].get(kind, 0) for kind in ("amx_bf16", "vdpbf16ps", "fma")),
        "float32": record["peaks"]["one"].get("fma", 0),
    }
    for axes, (dtype, peak) in zip(panels, bounds.items(), strict=True):
        found = [
            one
            for one in record["results"]
            if (one["group"], one["dtype"]) == ("attention", dtype) and one["name"].endswith("heads of 64")
        ]
        lengths = [int(one["name"].split()[0]) for one in found]
        axes.plot(lengths, [one["rate"] for one in found], "o-", color=OURS, label="carpool")
        axes.plot(lengths, [one["twin_rate"] for one in found], "o-", color=OTHERS, label="torch")
        if peak:
            axes.axhline(peak, color=INK, linewidth=0.8, linestyle=":", label="measured peak")
        axes.set_xscale("log", base=2)
        ticks = lengths[::2]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"attention, {dtype}, one core: GFLOP/s")
        axes.set_xlabel("tokens in a text, heads of 64")
    panels[0].legend()
    return figure


def _engine(record: Mapping[str, Any]) -> Any:
    """Tokens a second against each thing that was changed."""
    kinds = {
        "texts": "texts in a call",
        "length": "tokens in a text",
        "batch": "most tokens in a batch",
        "long": "tokens in a text, ModernBERT's shape",
    }
    present = [kind for kind in kinds if any(line["table"] == kind for line in record["lines"])]
    figure, panels = pyplot.subplots(
        1, max(1, len(present)), figsize=(3.2 * max(1, len(present)), 2.8), squeeze=False
    )
    for axes, kind in zip(panels[0], present, strict=False):
        lines = [line for line in record["lines"] if line["table"] == kind]
        for shade, dtype in zip(SHADES, dict.fromkeys(line["dtype"] for line in lines), strict=False):
            own = [line for line in lines if line["dtype"] == dtype]
            rates = [line["tokens"] / median(turn["seconds"] for turn in line["turns"]) for line in own]
            axes.plot([int(line["name"]) for line in own], rates, "o-", color=shade, label=dtype)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(kinds[kind])
        axes.legend()
    panels[0][0].set_ylabel("tokens/s")
    figure.tight_layout()
    return figure


def _overload(record: Mapping[str, Any]) -> Any:
    """What was answered of what was due."""
    figure, axes = pyplot.subplots(figsize=(4.2, 3.0))
    due = [level["rate"] for level in record["levels"]]
    good = [
        median(
            sum(one is not None for one in outcome["latencies"]) / outcome["seconds"]
            for outcome in level["outcomes"]
        )
        for level in record["levels"]
    ]
    axes.plot(due, good, "o-", color=OURS, label="answered")
    axes.axhline(record["peak"]["median"], color=INK, linewidth=0.8, linestyle=":", label="peak, closed loop")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests due a second")
    axes.set_ylabel("answered a second")
    axes.legend()
    return figure


PLOTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "compare": _compare,
    "kernels": _kernels,
    "engine": _engine,
    "overload": _overload,
}

if __name__ == "__main__":
    main()
