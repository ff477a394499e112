"""Late interaction as a checkpoint's files describe it: how queries and documents are written for the model. Pure.

    PyLate                   config_sentence_transformers.json: query_prefix, query_length, do_query_expansion, …
    Stanford's ColBERT       artifact.metadata: query_token_id, query_maxlen, attend_to_mask_tokens, …
    sentence-transformers 6  prompts; the Transformer's query_length, query_expansion, …; MultiVectorMask

/score and /rerank know what is a query and what a document, and of other texts a request's `input_type` may say it;
only then are they written in this way. What the files leave out is what PyLate, who made nearly all of them, takes for
it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from carpool.engine.errors import ConfigError, InvalidParameter

Role = Literal["query", "document"]

# What PyLate has at the top of config_sentence_transformers.json; `--hf-overrides` takes them as well.
PYLATE_KEYS = (
    "query_prefix",
    "document_prefix",
    "query_length",
    "document_length",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "skiplist_words",
)
# What checkpoints without artifact.metadata were trained with, by their cards; by model_type, in transformers' words.
_UNTOLD: Mapping[str, Mapping[str, Any]] = {
    "jina_embeddings_v3": {  # jina-colbert-v2
        "query_token_id": "[QueryMarker]",
        "doc_token_id": "[DocumentMarker]",
        "doc_maxlen": 8192,
        "attend_to_mask_tokens": True,
    },
}


class RoleText(NamedTuple):
    """A text and what it is to a late interaction."""

    role: Role
    text: str


def in_role(
    prompts: Seq[object], role: str | None, roles: Mapping[Role, frozenset[int]]
) -> list[RoleText] | None:
    """Prompts as texts of one of the `roles` that a model has; None where it has none, or none is named."""
    if role is None or not roles:
        return None
    if role not in roles:
        raise InvalidParameter(f"input_type must be 'query' or 'document', not {role!r}.", "input_type")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        raise InvalidParameter("input_type goes with texts, not with token ids.", "input_type")
    return [RoleText(cast("Role", role), text) for text in texts]


@dataclass(frozen=True, slots=True)
class Expansion:
    """A query is filled up to `length` tokens with `token` (None: the mask token, else the end of text).

    These look at the query and, unless it `attends` to them, are not looked at. A longer query is cut, if `cuts`.
    """

    length: int
    attends: bool = False
    token: str | None = None
    cuts: bool = True


@dataclass(frozen=True, slots=True)
class Writing:
    """How the texts of one role are written.

    One of `markers`, the first that the vocabulary has, stands behind the first token; where it has none of them,
    `spelled` stands before the text. `prompt` always does. The whole is cut to `length` tokens. Vectors of `skipped`
    words take no part in scores.
    """

    markers: tuple[str, ...] = ()
    spelled: str = ""
    prompt: str = ""
    length: int | None = None
    expansion: Expansion | None = None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LateInteraction:
    """`mean`: MaxSim is divided by the number of the query's tokens."""

    writings: Mapping[Role, Writing] = field(default_factory=dict)
    mean: bool = False

    @classmethod
    def pylate(cls, settings: Mapping[str, Any]) -> LateInteraction:
        """From PyLate's keys."""
        length = int(settings.get("query_length") or 32)
        expands = settings.get("do_query_expansion") is not False
        skiplist = settings.get("skiplist_words")
        query = Writing(
            **_beginning(settings, "query", "[Q] "),
            length=length,
            expansion=Expansion(length, bool(settings.get("attend_to_expansion_tokens")))
            if expands
            else None,
        )
        document = Writing(
            **_beginning(settings, "document", "[D] "),
            length=int(settings.get("document_length") or 180),
            skipped=tuple(string.punctuation if skiplist is None else skiplist),
        )
        return cls({"query": query, "document": document}, _is_mean(settings))

    @classmethod
    def stanford(cls, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> LateInteraction:
        """From artifact.metadata, empty where there is none. `config` is the model's; PyLate's keys in it win."""
        told = metadata or _UNTOLD.get(str(config.get("model_type")), {})
        settings: dict[str, Any] = {
            # Without a word of theirs, markers that the vocabulary may have, and that are else left out.
            "query_prefix": told.get("query_token_id") or ("[unused0]",),
            "document_prefix": told.get("doc_token_id") or ("[unused1]",),
            "query_length": told.get("query_maxlen"),
            "document_length": told.get("doc_maxlen"),
            "attend_to_expansion_tokens": told.get("attend_to_mask_tokens"),
            "skiplist_words": None if told.get("mask_punctuation", True) else [],
        }
        return cls.pylate({**settings, **{key: config[key] for key in PYLATE_KEYS if key in config}})

    @classmethod
    def sentence_transformers(
        cls, side: Mapping[str, Any], transformer: Mapping[str, Any], mask: Mapping[str, Any]
    ) -> LateInteraction:
        """From config_sentence_transformers.json, and the configurations of Transformer and MultiVectorMask."""
        if mask.get("keep_only_token_ids"):
            raise ConfigError("MultiVectorMask keeps the vectors of an image only; carpool serves texts.")
        prompts = side.get("prompts") or {}
        wanted = transformer.get("query_expansion")
        expansion = None
        if wanted:
            expansion = Expansion(
                int(wanted["length"]),
                bool(wanted.get("attend")),
                wanted.get("token"),
                wanted["strategy"] == "fixed",
            )
        words = tuple(mask.get("skiplist_words") or ())
        roles = mask.get("skiplist_tasks") or ["document"]
        query = Writing(
            prompt=str(prompts.get("query") or ""),
            length=expansion.length if expansion and expansion.cuts else transformer.get("query_length"),
            expansion=expansion,
            skipped=words if "query" in roles else (),
        )
        document = Writing(
            prompt=str(prompts.get("document") or ""),
            length=transformer.get("document_length"),
            skipped=words if "document" in roles else (),
        )
        return cls({"query": query, "document": document}, _is_mean(side))


def is_pylate(settings: Mapping[str, Any]) -> bool:
    """Whether config_sentence_transformers.json was written by PyLate."""
    return settings.get("model_type") == "ColBERT" or any(key in settings for key in PYLATE_KEYS)


def _is_mean(settings: Mapping[str, Any]) -> bool:
    return settings.get("similarity_fn_name") == "meanmaxsim"


def _beginning(settings: Mapping[str, Any], role: Role, default: str) -> dict[str, Any]:
    """What stands before a text: a marker, and a prompt, which some saves begin with the marker once more."""
    prefix = settings.get(f"{role}_prefix", default)
    prompt = str((settings.get("prompts") or {}).get(role) or "")
    if isinstance(prefix, tuple):
        return {"markers": prefix, "prompt": prompt}
    prefix = str(prefix or "")
    # "[Q] " is in some vocabularies with the blank and in others without.
    markers = tuple(dict.fromkeys([prefix, *prefix.split()[:1]])) if prefix.strip() else ()
    spelled = prefix if f"{role}_prefix" in settings else ""
    return {"markers": markers, "spelled": spelled, "prompt": prompt.removeprefix(prefix)}
