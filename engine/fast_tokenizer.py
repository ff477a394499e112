"""Fast tokenizers as transformers reads them from a model folder, with what its files say that it does not heed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from carpool.engine import sentencepiece
from carpool.engine.errors import ConfigError, first_line


def load_fast(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The folder's tokenizer, by transformers, which knows each family's own rules for special tokens.

    Of one with Python code of its own, tokenizer.json is taken as it is, or else made of tokenizer.model; the ends of
    a text (`add_bos_token`, `add_eos_token`) are as tokenizer_config.json has them. Since version 5 transformers
    goes by tokenizer.json alone, which lacks the end that e5-mistral was trained with; we do not.
    """
    folder = Path(path)
    try:
        with sentencepiece.read_by_transformers():
            fast = _loaded(folder, trust_remote_code)
    except Exception as error:  # transformers raises whatever went wrong inside
        raise ConfigError(f"The tokenizer in {path} cannot be loaded: {first_line(error)}") from error
    if getattr(fast, "backend_tokenizer", None) is None:
        raise ConfigError(f"The tokenizer in {path} has no fast version; save one with tokenizer.json.")
    return fast


def _loaded(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    own = _read_json(folder / "tokenizer_config.json")
    untrusted = not trust_remote_code and "auto_map" in own
    if untrusted and (folder / "tokenizer.json").is_file():
        ends = {key: own[key] for key in ("add_bos_token", "add_eos_token") if key in own}
        return PreTrainedTokenizerFast.from_pretrained(str(folder), **ends)
    if untrusted and (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, own)
    fast: Any = AutoTokenizer.from_pretrained(
        str(folder),
        trust_remote_code=trust_remote_code,
        config=None if trust_remote_code else _stand_in(folder),
    )
    if own.get("add_eos_token") and not _ends_texts(fast):
        fast = AutoTokenizer.from_pretrained(
            str(folder),
            trust_remote_code=trust_remote_code,
            add_bos_token=own.get("add_bos_token", fast("a")["input_ids"][0] == fast.bos_token_id),
            add_eos_token=True,
        )
    return fast


def _stand_in(folder: Path) -> Any:
    """For config.json, which transformers asks for the tokenizer's class, where it would stumble over a model that it
    does not know or over a value that has nothing to do with words; None where it does not."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    own = _read_json(folder / "config.json")
    kind = own.get("model_type")
    if kind not in CONFIG_MAPPING:
        return PreTrainedConfig()
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception:  # the loader will say what is wrong, unless the user's overrides mend it
        return CONFIG_MAPPING[kind](tokenizer_class=own.get("tokenizer_class"))
    return None


def _from_sentencepiece(folder: Path, own: Mapping[str, Any]) -> Any:
    """Of tokenizer.model, with the special tokens of tokenizer_config.json (`own`) in their places."""
    from transformers import PreTrainedTokenizerFast

    added = {
        int(i): tokenizers.AddedToken(**{**token, "special": bool(token.get("special"))})
        for i, token in (own.get("added_tokens_decoder") or {}).items()
    }
    plain = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in own.items()
        if key.endswith("_token") or key in ("chat_template", "model_max_length", "truncation_side")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece.read(folder / "tokenizer.model", added),
        **{"add_bos_token": True, "add_eos_token": False, **plain},
    )


def end_notice(folder: Path, fast: Any) -> str | None:
    """What to say where texts end as tokenizer_config.json has it, and transformers' users would get another end."""
    own, stored = _read_json(folder / "tokenizer_config.json"), folder / "tokenizer.json"
    if not own.get("add_eos_token") or "auto_map" in own or not stored.is_file() or not _ends_texts(fast):
        return None
    plain = tokenizers.Tokenizer.from_file(str(stored))
    plain.no_padding()
    if plain.encode("a").ids[-1:] == [fast.eos_token_id]:
        return None
    return (
        f"tokenizer_config.json wants {fast.eos_token} behind every text (add_eos_token) and tokenizer.json does not "
        "put it there: carpool does. transformers 5 and what is built on it do not, and get other vectors."
    )


def _ends_texts(fast: Any) -> bool:
    """Whether a text is followed by the tokenizer's own end."""
    return fast.eos_token_id is None or fast("a")["input_ids"][-1:] == [fast.eos_token_id]


def _read_json(path: Path) -> Mapping[str, Any]:
    """What is no JSON object is for transformers to stumble over."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
