"""Devices and dtype: what "auto" means on this machine, and what of it can be served on."""

from collections.abc import Sequence as Seq

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


_OLDEST = (7, 5)  # compute capability: Turing, the first that the kernels are compiled for


def resolve_devices(name: str, count: int = 1) -> tuple[torch.device, ...]:
    """The CPU, or `count` GPUs from the named one on; "auto" is the first GPU where there is one.

    A GPU has its number, whether it was named with it or not. Raises ConfigError for what is not there or too old.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        if count > 1:
            raise ConfigError(
                f"--data-parallel-size {count} counts GPUs: on a CPU, --cpu-workers says how many threads run batches."
            )
        return (torch.device("cpu"),)
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: {_why_no_cuda()}, or use --device cpu.")
    first, there = torch.device(name).index or 0, torch.cuda.device_count()
    if first >= there:
        raise ConfigError(f"--device {name}: {_gpus(there)} here, and numbers start at 0.")
    if first + count > there:
        behind = f" from {name} on" if first else ""
        raise ConfigError(f"--data-parallel-size {count}: {_gpus(there - first)} here{behind}.")
    devices = tuple(torch.device("cuda", index) for index in range(first, first + count))
    for device in devices:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            raise ConfigError(
                f"{device} is of compute capability {_dotted(capability)}, and the kernels are for {_dotted(_OLDEST)} "
                "and later: name another with --device cuda:N, or use --device cpu."
            )
    return devices


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            "the torch that is installed is built for CPUs only: "
            "pip install --force-reinstall --index-url https://pypi.org/simple torch"
        )
    return (
        f"torch, built for CUDA {torch.version.cuda}, finds no device: see whether nvidia-smi lists one with a driver "
        "that new, and that CUDA_VISIBLE_DEVICES does not hide it"
    )


def _gpus(count: int) -> str:
    return "there is one GPU" if count == 1 else f"there are {count} GPUs"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def limit_memory(devices: Seq[torch.device], fraction: float) -> None:
    """Let this process take no more than that part of each GPU's memory, for the sake of others on it."""
    for device in devices:
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def resolve_dtype(
    name: str, stored: str | None, device: torch.device, model_type: str = ""
) -> tuple[torch.dtype, str | None]:
    """The dtype to run in, and a notice where that is not what was stored or will be slow.

    "auto" is bfloat16 on a CPU that has instructions for its products; elsewhere the checkpoint's when that is 16-bit
    and the device computes it natively, else float32.
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
        slow = f"{named} is emulated on this device and will be slow." if named not in native else None
        return getattr(torch, named), slow
    if "bfloat16" in fit and _multiplies_bfloat16(device):
        return torch.bfloat16, None
    if stored in native:
        return getattr(torch, stored), None
    notice = f"The checkpoint is {stored}, which this device does not compute natively: running in float32."
    return torch.float32, notice if stored in ("float16", "bfloat16") else None


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU with AVX-512 BF16 or AMX: bfloat16 takes half the time of float32 there, or less."""
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _native_16_bit(device: torch.device) -> set[str]:
    if device.type == "cuda":
        # Not torch.cuda.is_bf16_supported, which says yes where bfloat16 is emulated.
        return {"float16", "bfloat16"} if torch.cuda.get_device_capability(device) >= (8, 0) else {"float16"}
    native = set()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        native.add("bfloat16")
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        native.add("float16")
    return native
