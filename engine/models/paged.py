"""Paged: whether a model's prompts can be run in parts, with keys and values kept between them. Asked at load.

Each layer has to look back only, through us, and at nothing that is not kept: whether it does is tried. A convolution,
a recurrence, or positions that go by what else is in the row give themselves away by disagreeing with the prompt as a
whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice, pairwise

import torch
from torch import Tensor

from carpool.engine.cache.storage import KeptLayer, Storage
from carpool.engine.errors import first_line
from carpool.engine.models import attention
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.difference import apart
from carpool.engine.models.stretching import StretchingBackbone
from carpool.engine.packing import Keeping, pack_ids
from carpool.kernels.attention import Choice

# Largest relative difference between a prompt in parts and as a whole: of rounding, and far below that of a token more
# or less to look at.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_LONGEST = 1024  # tokens; windows of which two would be longer are not tried


class CannotPage(Exception):
    """Why not, as the end of a sentence."""


def number_layers(backbone: Backbone) -> list[KeptLayer]:
    """What each layer that attends keeps, in order; from now on each knows its place in this order, and so do copies.

    Raises CannotPage if there is one that cannot be kept. To be called when all layers are those that will serve.
    """
    if backbone.packing != "packed":
        raise CannotPage("it is not packed")
    if isinstance(backbone, StretchingBackbone):
        raise CannotPage("its rotary frequencies follow the longest prompt of a batch")
    device = next(backbone.module.parameters()).device
    with attention.calls() as calls, torch.inference_mode():
        backbone.forward(pack_ids([[0, 0]], device))
    if not calls:
        raise CannotPage("no layer attends")
    if len({id(call.layer) for call in calls}) < len(calls):
        raise CannotPage("one layer attends more than once")
    for number, call in enumerate(calls):
        name = type(call.layer).__name__
        if not call.causal:
            raise CannotPage(f"{name} looks ahead")
        if call.biased:
            raise CannotPage(f"{name} minds distances")
        setattr(call.layer, attention.NUMBER, number)
    return [KeptLayer(call.heads, call.size, call.dtype) for call in calls]


def pageable_layers(
    backbone: Backbone, *, vocab_size: int, max_model_len: int, block_size: int, limits: Iterable[int] = ()
) -> list[KeptLayer]:
    """The layers as `number_layers` has them, of a model whose prompts can be run in parts; else raises CannotPage.

    Prompts of the trial are longer than the `limits`, windows and the like, unless that took minutes.
    """
    try:
        with torch.inference_mode():
            return _tried(backbone, vocab_size, max_model_len, block_size, limits)
    except CannotPage:
        raise
    except Exception as error:  # whatever its code raises
        raise CannotPage(first_line(error).rstrip(".")) from error


def _tried(
    backbone: Backbone, vocab_size: int, max_model_len: int, block_size: int, limits: Iterable[int]
) -> list[KeptLayer]:
    layers = number_layers(backbone)
    beyond = [2 * limit for limit in limits if 2 * limit <= _LONGEST]
    length = min(max(3 * block_size + 5, 50, *beyond), max_model_len)
    shared = (length - 1) // block_size
    if not shared:
        raise CannotPage(f"no prompt is longer than a block of {block_size} tokens")
    generator = torch.Generator().manual_seed(13)
    low = min(5, vocab_size - 1)

    def words(count: int) -> list[int]:
        return torch.randint(low, vocab_size, (count,), generator=generator).tolist()

    device = next(backbone.module.parameters()).device
    prompt, beside = words(length), words(min(9, max_model_len))
    tails = [words(min(own, max_model_len - shared * block_size)) for own in (1, 7, block_size + 2)]
    needed = [-(-len(ids) // block_size) for ids in (prompt, *tails)]
    storage = Storage.of(layers, sum(needed), block_size, device)
    # Backwards: where a block lies says nothing of whose it is.
    free = iter(range(storage.num_blocks - 1, -1, -1))
    leader, *own = (list(islice(free, count)) for count in needed)

    def run(*parts: tuple[list[int], list[int] | None, int]) -> tuple[Tensor, ...]:
        """Hidden states of each: ids, the blocks of their prompt, and how much of it was run before."""
        ids, blocks, pasts = map(list, zip(*parts, strict=True))
        packed = pack_ids(ids, device, keeping=Keeping(storage, blocks, pasts))
        return torch.split(backbone.forward(packed), packed.lengths)

    def empty() -> None:
        """So that whoever looks at what nobody wrote gives himself away."""
        for pages in chain.from_iterable(storage.layers):
            pages.fill_(torch.nan)

    empty()
    (whole,) = run((prompt, None, 0))
    cuts = [0, *(cut for cut in (length // 3, length // 3 + 1, 2 * length // 3 + 2) if cut < length), length]
    chunks = [
        run((beside, None, 0), (prompt[start:end], leader, start))[1]
        for start, end in pairwise(cuts)
        if start < end
    ]
    if not (off := apart(torch.cat(chunks), whole)) <= _TOLERANCE.get(whole.dtype, 1e-3):
        raise CannotPage(
            f"a prompt comes out otherwise in chunks than as a whole (relative difference {off:.1e})"
        )
    empty()
    start = shared * block_size
    _, *behind = run(
        (prompt, leader, 0),
        *((tail, leader[:shared] + rest, start) for tail, rest in zip(tails, own, strict=True)),
    )
    for tail, part in zip(tails, behind, strict=True):
        (alone,) = run((prompt[:start] + tail, None, 0))
        if not (off := apart(part, alone[start:])) <= _TOLERANCE.get(whole.dtype, 1e-3):
            raise CannotPage(
                f"a prompt comes out otherwise behind another's beginning (relative difference {off:.1e})"
            )
    return layers


def paged_attention_chosen(backbone: Backbone, storage: Storage) -> Counter[Choice]:
    """Which attention to what is kept serves how many layers. Writes to the first two blocks of the storage.

    Every layer has then met its choice: nothing is tried or compiled for the first time while serving.
    """
    device = next(backbone.module.parameters()).device
    keeping = Keeping(storage, [[0, 1]], [1])
    with attention.choices() as made, torch.inference_mode():
        backbone.forward(pack_ids([[0]], device, keeping=keeping))
    return Counter(made)
