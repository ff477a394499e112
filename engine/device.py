"""Device and dtype: what "auto" means on this machine."""

import torch

from carpool.engine.errors import ConfigError

# Their activations go beyond float16's largest number.
_OVERFLOWING = ("gemma2", "gemma3", "gemma3_text")


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu.")
    return torch.device(name)


def resolve_dtype(
    name: str, stored: str | None, device: torch.device, model_type: str = ""
) -> tuple[torch.dtype, str | None]:
    """The dtype to run in, and a notice where that is not what was stored or will be slow.

    "auto" is the checkpoint's when that is 16-bit and the device computes it natively, else float32.
    """
    named = {"float": "float32", "half": "float16"}.get(name, name)
    native = {"float32"} | _native_16_bit(device)
    if model_type in _OVERFLOWING and named == "float16":
        raise ConfigError(
            f"float16 overflows in models of type {model_type}: use --dtype bfloat16 or float32."
        )
    if model_type in _OVERFLOWING and named == "auto" and stored == "float16":
        safe = "bfloat16" if "bfloat16" in native else "float32"
        return getattr(torch, safe), f"float16 overflows in models of type {model_type}: running in {safe}."
    if named != "auto":
        slow = f"{named} is emulated on this CPU and will be slow." if named not in native else None
        return getattr(torch, named), slow
    if stored in native:
        return getattr(torch, stored), None
    notice = f"The checkpoint is {stored}, which this device does not compute natively: running in float32."
    return torch.float32, notice if stored in ("float16", "bfloat16") else None


def _native_16_bit(device: torch.device) -> set[str]:
    if device.type == "cuda":
        return {"float16", "bfloat16"} if torch.cuda.is_bf16_supported() else {"float16"}
    native = set()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        native.add("bfloat16")
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        native.add("float16")
    return native
