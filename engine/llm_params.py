"""What a script says of its prompts' tokens, poolings and adapters, checked, and as the engine knows it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from carpool.engine.changes import LoadAdapter
from carpool.engine.errors import InvalidParameter
from carpool.engine.model_info import ModelInfo
from carpool.engine.params import LoRARequest, Padding, PoolingParams, Task, TokenizationParams

O = TypeVar("O")  # noqa: E741

# What a tokenizer's `truncation` may say, and whether it cuts; what its `padding` may, and what it is to the engine: up
# to the longest of a batch changes no result.
_TRUNCATIONS: Mapping[Any, bool] = {
    None: False,
    False: False,
    "do_not_truncate": False,
    True: True,
    "longest_first": True,
    "only_first": True,
    "only_second": True,
}
_PADDINGS: Mapping[Any, Padding | None] = {
    None: None,
    True: None,
    "longest": None,
    False: "do_not_pad",
    "do_not_pad": "do_not_pad",
    "max_length": "max_length",
}


def one_each(prompts: Seq[object], given: O | Seq[O], name: str) -> list[O]:
    """What was given for each prompt, or the one thing given for all."""
    each = list(given) if isinstance(given, Seq) else [given] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} {name} were given.")
    return each


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────


def tokenization_of(
    truncate: int | None, kwargs: Mapping[str, Any] | None, max_model_len: int
) -> TokenizationParams:
    """`kwargs` are TokenizationParams' fields, or a tokenizer's `truncation`, `max_length` and `padding`."""
    if not isinstance(kwargs, Mapping | None):
        raise InvalidParameter(f"tokenization_kwargs must be a dict, got {kwargs!r}.", "tokenization_kwargs")
    given = dict(kwargs or {})
    length = given.pop("max_length", None)
    if _meaning("truncation", given.pop("truncation", length is not None), _TRUNCATIONS):
        given.setdefault("truncate_prompt_tokens", -1 if length is None else length)
    if truncate is not None:
        given["truncate_prompt_tokens"] = truncate
    padding = _meaning("padding", given.pop("padding", None), _PADDINGS)
    if padding == "max_length" and length not in (None, max_model_len):
        raise InvalidParameter(
            f"padding fills up to the model's {max_model_len} tokens, not to max_length={length}.",
            "padding",
        )
    given["padding"] = padding
    known = [field.name for field in fields(TokenizationParams)]
    for name in given:
        if name not in known:
            raise InvalidParameter(
                f"tokenization_kwargs has no {name!r}: it may name {', '.join(known)}.", name
            )
    return TokenizationParams(**given)


def _meaning(name: str, value: object, meanings: Mapping[Any, O]) -> O:
    if isinstance(value, str | bool | None) and value in meanings:
        return meanings[value]
    raise InvalidParameter(f"{name} must be one of {', '.join(map(repr, meanings))}, got {value!r}.", name)


def cut_as_told(tokenization: TokenizationParams, params: PoolingParams) -> TokenizationParams:
    """With what the parameters of a prompt say of its length, where the call does not."""
    if params.truncate_prompt_tokens is not None and tokenization.truncate_prompt_tokens is None:
        tokenization = replace(tokenization, truncate_prompt_tokens=params.truncate_prompt_tokens)
    limits: dict[str, Any] = dict(params.extra_kwargs or {})
    limits.pop("chat_template_kwargs", None)
    for name in limits:
        if name not in ("max_tokens_per_query", "max_tokens_per_doc"):
            raise InvalidParameter(
                f"extra_kwargs has no {name!r}: it may name max_tokens_per_query, max_tokens_per_doc and "
                "chat_template_kwargs.",
                "extra_kwargs",
            )
    return replace(tokenization, **limits) if limits else tokenization


# ── poolings ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_params(params: PoolingParams, names: tuple[str | None, ...]) -> None:
    """Refuse what is none, and parameters that are meant for another task than the one of these `names`."""
    if not isinstance(params, PoolingParams):
        raise TypeError(f"pooling_params is made of PoolingParams, not of {type(params).__name__}")
    if params.task not in (None, *names):
        raise InvalidParameter(
            f"You cannot overwrite param.task={params.task!r} with pooling_task={names[-1]!r}!", "task"
        )


def engines_own(params: PoolingParams) -> PoolingParams:
    """Without what is for LLM. What is to be averaged is not finished before."""
    active = False if params.late_chunking_params else params.use_activation
    return PoolingParams(dimensions=params.dimensions, use_activation=active, embed_dtype=params.embed_dtype)


def check_late_chunking(
    item: str | list[int], cut: TokenizationParams, tasks: tuple[Task, ...], model: ModelInfo
) -> None:
    """Before anything runs: it is for whole texts, and for vectors of tokens that can be averaged."""
    if tasks != ("token_embed",):
        why = "requires token_embed."
    elif not isinstance(item, str) or not item:
        why = "takes texts that are not empty, and no token ids."
    elif cut.truncate_prompt_tokens is not None or cut.padding == "max_length":
        why = "does not support truncation or padding."
    elif not model.linear_head:
        why = "does not support this model: the head behind its tokens is not linear."
    else:
        return
    raise InvalidParameter(f"Late chunking {why}", "late_chunking_params")


def template_variables(given: object, params: PoolingParams) -> Mapping[str, Any] | None:
    """For the template of a scored pair: those given, or those that its parameters bring along."""
    variables = given or (params.extra_kwargs or {}).get("chat_template_kwargs")
    if not isinstance(variables, Mapping | None):
        raise InvalidParameter(
            f"chat_template_kwargs must be a dict, got {variables!r}.", "chat_template_kwargs"
        )
    return variables


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────


def adapter_of(request: LoRARequest, model: ModelInfo, *, may_load: bool) -> tuple[str, LoadAdapter | None]:
    """The name of the adapter that is asked for, and what has to be done before it is there."""
    if not hasattr(request, "lora_name"):
        raise TypeError(f"lora_request is made of LoRARequest, not of {type(request).__name__}")
    name, path = str(request.lora_name), str(getattr(request, "lora_path", ""))
    again = bool(getattr(request, "load_inplace", False))
    if may_load and path and (again or name not in model.adapters):
        return name, LoadAdapter(name, path, again, once=not again)
    if name not in model.adapters:
        told = f"{name!r}: {path or '…'!r}"
        raise InvalidParameter(
            f"There is no adapter {name!r}: load it at start with LLM(lora_modules={{{told}}}), or have it loaded "
            "when it is first asked for, with LLM(enable_lora=True) and its lora_path.",
            "lora_request",
        )
    loaded = model.lora_modules.get(name)
    if path and loaded is not None and not _is_same(path, loaded):
        raise InvalidParameter(
            f"The adapter {name!r} was loaded from {loaded}, not from {path}.", "lora_request"
        )
    return name, None


def _is_same(path: str, other: str) -> bool:
    """Whether both name one folder; a path that cannot be names none."""
    try:
        return Path(path).expanduser().resolve() == Path(other).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return False
