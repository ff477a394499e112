"""The isolation probe: does a packed sequence come out as it does alone? Asked of every model at load.

It needs no reference: a model whose code bypasses the attention registry, mixes neighbouring tokens, or bends
its positions by the batch gives itself away by disagreeing with itself.
"""

import torch

from carpool.engine.errors import ConfigError
from carpool.engine.models.attention import UnknownAttentionArgument
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import pack_ids

# Largest relative difference between packed and alone. Rounding gives 1e-6 in float32 and 1e-2 in bfloat16
# (products are blocked differently for other row counts); a leak gives 0.1 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check_isolation(
    backbone: Backbone, *, vocab_size: int, max_model_len: int, window: int | None = None
) -> None:
    """Raise ConfigError unless random sequences, packed, come out as each does alone.

    Lengths straddle the sliding `window`, so that a window that reaches into a neighbour shows.
    """
    device = next(backbone.module.parameters()).device
    generator = torch.Generator().manual_seed(7)
    lengths = [9, 30, 1, 100 if window is None or window > 512 else 2 * window]
    lengths = [min(length, max_model_len) for length in lengths]
    low = min(5, vocab_size - 1)
    sequences = [torch.randint(low, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    name = type(backbone.module).__name__
    try:
        with torch.inference_mode():
            packed_batch = pack_ids(sequences, device)
            packed = torch.split(backbone.forward(packed_batch), lengths)
            alone = [backbone.forward(pack_ids([ids], device)) for ids in sequences]
    except UnknownAttentionArgument as error:
        raise ConfigError(f"{name} cannot be served: {error}.") from error
    for together, single in zip(packed, alone, strict=True):
        difference = float(
            (together.float() - single.float()).norm() / single.float().norm().clamp_min(1e-12)
        )
        if not difference <= _TOLERANCE.get(single.dtype, 1e-3):
            raise ConfigError(
                f"{name} cannot be served packed: texts of one batch change each other's results "
                f"(relative difference {difference:.1e}). It does not use transformers' attention registry throughout."
            )
