"""Any checkpoint folder beside the libraries that its users know: for models that are no members of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.packing import pack_ids
from carpool.engine.params import PoolingParams, Task
from zoo.measure import Prompt, difference, run

TEXTS = [text.strip() for text in tiny.TEXTS if text]
CPU = torch.device("cpu")


def compare_folder(folder: Path) -> Iterator[tuple[str, float, float]]:
    """What was compared, and the largest difference alone and in company; float32.

    Hidden states and a classifier's logits beside transformers' own classes, finished embeddings beside
    sentence-transformers where the folder has its files. A folder that transformers cannot load has no hidden states
    to compare with: that raises what it raises.
    """
    parts = build(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1))
    batch = [ids[: parts.model.max_model_len] for ids in parts.tokenizer.encode(TEXTS)]
    yield "transformers: hidden states", *_hidden(folder, parts, batch)
    classifiers: tuple[tuple[Task, str, Any], ...] = (
        ("classify", "ForSequenceClassification", AutoModelForSequenceClassification),
        ("token_classify", "ForTokenClassification", AutoModelForTokenClassification),
    )
    for task, suffix, auto in classifiers:
        if any(name.endswith(suffix) for name in parts.model.architectures):
            yield f"transformers: logits of {task}", *_logits(folder, parts, batch, task, auto)
    if (folder / "modules.json").is_file() and "embed" in parts.model.tasks:
        yield "sentence-transformers: embeddings", *_embeddings(folder, parts, batch)


def _hidden(folder: Path, parts: Parts, batch: list[list[int]]) -> tuple[float, float]:
    backbone = parts.runners[0]._backbone
    truths = _each(_stock(AutoModel, folder), batch, lambda output: output.last_hidden_state[0])
    with torch.inference_mode():
        alone = [backbone.forward(pack_ids([ids], CPU)) for ids in batch]
        company = torch.split(backbone.forward(pack_ids(batch, CPU)), [len(ids) for ids in batch])
    return _worst(alone, truths), _worst(list(company), truths)


def _logits(folder: Path, parts: Parts, batch: list[list[int]], task: Task, auto: Any) -> tuple[float, float]:
    truths = _each(_stock(auto, folder), batch, lambda output: output.logits[0])
    raw = PoolingParams(use_activation=False)
    prompts = [Prompt(task, ids, params=raw) for ids in batch]
    return _worst([run(parts, [prompt])[0] for prompt in prompts], truths), _worst(
        run(parts, prompts), truths
    )


def _embeddings(folder: Path, parts: Parts, batch: list[list[int]]) -> tuple[float, float]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    truths = [model.encode(text, convert_to_tensor=True, show_progress_bar=False) for text in TEXTS]
    prompts = [Prompt("embed", ids) for ids in batch]
    return _worst([run(parts, [prompt])[0] for prompt in prompts], truths), _worst(
        run(parts, prompts), truths
    )


def _stock(auto: Any, folder: Path) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def _each(model: Any, batch: list[list[int]], take: Callable[[Any], Tensor]) -> list[Tensor]:
    rows = [torch.tensor([ids]) for ids in batch]
    return [take(model(input_ids=row, attention_mask=torch.ones_like(row))).float() for row in rows]


def _worst(ours: list[Tensor], truths: list[Tensor]) -> float:
    return max(difference(own, truth) for own, truth in zip(ours, truths, strict=True))
