"""What a request cost."""

from __future__ import annotations

from msgspec import Struct


class PromptTokensDetails(Struct, gc=False):
    cached_tokens: int  # found in the prefix cache


class Usage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None  # null unless the server is to tell


class BinaryUsage(Struct, gc=False):
    """In the `metadata` header of a binary answer."""

    prompt_tokens: int
    total_tokens: int
