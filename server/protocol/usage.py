"""What a request cost."""

from __future__ import annotations

from msgspec import Struct


class Usage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None

    @classmethod
    def of(cls, tokens: int) -> Usage:
        return cls(tokens, tokens)


class BinaryUsage(Struct, gc=False):
    """In the `metadata` header of a binary answer."""

    prompt_tokens: int
    total_tokens: int
