"""The probe: does a sequence come out in company as it does alone, and alone as transformers has it? Asked at load.

The first needs no reference: a model whose code bypasses the attention registry, mixes neighbouring tokens, bends its
positions by the batch or remembers what it saw gives itself away by disagreeing with itself. The second is for what is
wrong in company and alone alike: a patch that a new version of transformers has outrun, or something in the masks that
are not built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.errors import first_line
from carpool.engine.models import attention
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.difference import apart, tokens_apart
from carpool.engine.models.masks import attending_by, mask_fault
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.patches import patch, unpatch
from carpool.engine.models.stretching import StretchingBackbone
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.kernels.attention import Choice

# Largest relative difference between company and alone. Rounding gives 1e-6 in float32 and 1e-2 in bfloat16
# (products are blocked differently for other row counts); a leak gives 0.1 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_LONGEST = 1024  # tokens; a probe over twice a longer limit would take minutes with a large model


class Probe:
    """Random sequences for one model, the same for every way of running it."""

    def __init__(self, *, vocab_size: int, max_model_len: int, limits: Iterable[int] = ()) -> None:
        """Lengths straddle the `limits`, windows and rotary ones: what begins beyond one shows."""
        self._limits, self._max_model_len = list(limits), max_model_len
        beyond = [2 * limit for limit in self._limits if 2 * limit <= _LONGEST]
        # The long ones between short ones: what reaches back shows, and what reaches ahead. Two of equal length, and
        # two so near that a padded batch pads one of them.
        lengths = [9, *(beyond or [100]), 1, 30, 9, 24]
        low = min(5, vocab_size - 1)
        generator = torch.Generator().manual_seed(7)
        self.sequences: list[list[int]] = [
            torch.randint(low, vocab_size, (min(n, max_model_len),), generator=generator).tolist()
            for n in lengths
        ]

    def fault(self, backbone: Backbone) -> str | None:
        """What is wrong with running the model this way, as the end of a sentence; None if nothing is."""
        try:
            with torch.inference_mode():
                return self._leak(backbone) or self._untruth(backbone)
        except Exception as error:  # whatever its code raises
            return first_line(error).rstrip(".")

    def _leak(self, backbone: Backbone) -> str | None:
        device = next(backbone.module.parameters()).device
        first = _forward(backbone, pack_ids(self.sequences[:1], device))
        company = _forward(backbone, pack_ids(self.sequences, device))
        if not company.isfinite().all():
            return f"what it computes in {str(company.dtype).removeprefix('torch.')} is not finite"
        if company.eq(company[0]).all() and len({token for ids in self.sequences for token in ids}) > 1:
            return "it makes the same of every token, so its weights are empty or damaged"
        alone = [_forward(backbone, pack_ids([ids], device)) for ids in self.sequences]
        for together, single in zip(torch.split(company, [len(x) for x in alone]), alone, strict=True):
            if not (off := apart(together, single)) <= _TOLERANCE.get(single.dtype, 1e-3):
                return f"texts of one batch change each other's results (relative difference {off:.1e})"
        if not (off := apart(alone[0], first)) <= _TOLERANCE.get(first.dtype, 1e-3):
            return f"a text's result changes with what was asked before (relative difference {off:.1e})"
        return None

    def _untruth(self, backbone: Backbone) -> str | None:
        """A difference from what transformers makes of the model; our own classes have nothing to be compared with."""
        if backbone.packing == "packed":
            fault = mask_fault(
                backbone, self.sequences[0], max_model_len=self._max_model_len, limits=self._limits
            )
            if fault:
                return fault
        if type(backbone.module).__module__.startswith("carpool."):
            return None
        batch = pack_ids(self.sequences[1:2], next(backbone.module.parameters()).device)
        ours, theirs = backbone.forward(batch), _stock(backbone, batch)
        each = tokens_apart(ours, theirs)
        # A few tokens may differ by more, since rounding may send them to other experts; half lie beyond a limit.
        if not (off := float(each.quantile(0.75))) <= (1e-3 if theirs.dtype == torch.float32 else 0.1):
            return f"results differ from those of transformers' own attention (relative difference {off:.1e})"
        return None


def keeps_unseen(backbone: Backbone, vocab_size: int) -> bool:
    """Whether tokens that are not to be looked at (an expanded query's) are indeed not, by any other."""
    device = next(backbone.module.parameters()).device
    low, high = min(5, vocab_size - 2), vocab_size - 1
    one, other = (
        [low, high, low, high],
        [low, high, high, high],
    )  # the third and fourth are not to be looked at
    with torch.inference_mode():
        rows = [backbone.forward(pack_ids([ids], device, unseen=[2])) for ids in (one, other)]
    seen, same = [0, 1, 3], _TOLERANCE.get(rows[0].dtype, 1e-3)
    return apart(rows[0][seen], rows[1][seen]) <= same


def attention_chosen(backbone: Backbone, vocab_size: int, *, unseen: bool = False) -> Counter[Choice]:
    """Which attention serves how many layers; none of ours does in a padded model. `unseen`: for expanded queries, too.

    Every layer has then met its choice: nothing is tried or compiled for the first time while serving.
    """
    device = next(backbone.module.parameters()).device
    ids = [[min(5, vocab_size - 1)] * length for length in (3, 2)]
    with attention.choices() as made, torch.inference_mode():
        for places in ((), (2, None)) if unseen else ((),):
            backbone.forward(pack_ids(ids, device, unseen=places))
    return Counter(made)


def _forward(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """Packed, every layer that attends must do so through us: one that does not may leak less than the probe sees."""
    with attention.witnessed() as callers:
        hidden = backbone.forward(batch)
    if backbone.packing == "packed":
        called = {id(module) for module in callers}
        layers = [module for module in backbone.module.modules() if _attends(module)]
        silent = [module for module in layers if id(module) not in called]
        if silent or not called:
            kind = type(silent[0]).__name__ if silent else "the model"
            raise RuntimeError(f"{kind} does not attend through transformers' attention registry")
    return hidden


def _stock(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """[T, H]: the batch by transformers' own layers and its eager attention, which defines what a model computes."""
    module = backbone.module
    patched = unpatch(module)
    try:
        with attending_by(module, "eager"):
            stock: Backbone = PaddedBackbone(module, attention="eager", pads=False)
            if isinstance(backbone, StretchingBackbone):
                stock = StretchingBackbone(stock, backbone.limit)
            return stock.forward(batch)
    finally:
        if patched:
            patch(module)


def _attends(module: nn.Module) -> bool:
    """transformers' attention layers say whether they are causal; so do ours."""
    nature: Any = getattr(module, "is_causal", None)
    return isinstance(nature, bool) and next(module.parameters(), None) is not None
