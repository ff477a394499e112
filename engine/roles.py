"""Roles: queries and documents of a late interaction as token ids, as the model was trained to read them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from carpool.engine.errors import ConfigError
from carpool.engine.late_interaction import Writing


@dataclass(frozen=True, slots=True)
class Scribe:
    """A Writing with its words looked up. `skipped` are ids whose vectors take no part in scores."""

    prompt: str = ""
    marker: int | None = None
    length: int | None = None
    filler: int | None = None  # the token of the expansion, None where there is none
    fill_to: int = 0
    attends: bool = False
    skipped: frozenset[int] = frozenset()

    @classmethod
    def of(cls, writing: Writing, id_of: Callable[[str], int | None], mask: int | None) -> Scribe:
        """`id_of` looks a word up; `mask` is the token that expands a query where the files name none."""
        marker = next((found for name in writing.markers if (found := id_of(name)) is not None), None)
        expansion, filler = writing.expansion, None
        if expansion is not None:
            filler = id_of(expansion.token) if expansion.token else mask
            if filler is None:
                raise ConfigError(
                    f"Queries are to be expanded by {expansion.token or 'a mask token'}, which the vocabulary lacks."
                )
        return cls(
            prompt=writing.prompt if marker is not None else writing.spelled + writing.prompt,
            marker=marker,
            length=writing.length,
            filler=filler,
            fill_to=expansion.length if expansion else 0,
            attends=bool(expansion and expansion.attends),
            skipped=frozenset(found for word in writing.skipped if (found := id_of(word)) is not None),
        )

    @property
    def expands_unseen(self) -> bool:
        """Whether it writes tokens that are not to be looked at."""
        return self.filler is not None and not self.attends

    def without_expansion(self) -> Scribe:
        return replace(self, filler=None)

    def room(self, limit: int | None) -> int | None:
        """Tokens that a text may have before the marker is set into it; `limit` is the caller's. None: no bound."""
        bounds = [bound for bound in (self.length, limit) if bound is not None]
        return max(1, min(bounds) - (self.marker is not None)) if bounds else None

    def write(self, ids: list[int], longest: int) -> tuple[list[int], int | None]:
        """The ids marked and expanded, to `longest` at most; and from where on they are not looked at, if so."""
        if self.marker is not None:
            ids = [*ids[:1], self.marker, *ids[1:]]
        missing = min(self.fill_to, longest) - len(ids)
        if self.filler is None or missing <= 0:
            return ids, None
        return ids + [self.filler] * missing, None if self.attends else len(ids)
