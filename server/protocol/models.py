"""GET /v1/models."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class ModelPermission(Struct, gc=False):
    """The reference lists one; no client is known to read it."""

    id: str
    created: int
    object: Literal["model_permission"] = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "carpool"
    root: str
    parent: str | None = None  # of an adapter: the model it sits on
    max_model_len: int
    adapter_tasks: list[str] | UnsetType = UNSET  # what `task` may say; left out where it says nothing
    permission: list[ModelPermission]


class ModelList(Struct, kw_only=True, gc=False):
    object: Literal["list"] = "list"
    data: list[ModelCard]
