"""Device and dtype: what "auto" means on this machine."""

import torch

from carpool.engine.errors import ConfigError

# 16-bit types that models of a type cannot run in, and what happens if they do.
_OVERFLOWS = {"float16": "overflows"}
_UNFIT = {
    "deberta": dict.fromkeys(("float16", "bfloat16"), "meets float32 in transformers' own code and fails"),
    "gemma2": _OVERFLOWS,
    "gemma3": _OVERFLOWS,
    "gemma3_text": _OVERFLOWS,
}


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
    unfit = _UNFIT.get(model_type, {})
    fit = [dtype for dtype in ("bfloat16", "float32") if dtype not in unfit]
    if named in unfit:
        raise ConfigError(
            f"{named} {unfit[named]} in models of type {model_type}: use --dtype {' or '.join(fit)}."
        )
    if named == "auto" and stored in unfit:
        safe = next(dtype for dtype in fit if dtype in native)
        return getattr(
            torch, safe
        ), f"{stored} {unfit[stored]} in models of type {model_type}: running in {safe}."
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
