"""Tokenizer: text to ids and back. One object for all threads; it is never changed after load.

Setting truncation on a shared `tokenizers.Tokenizer` for one request would race with the others, so the ids are cut
here, sparing the special tokens as the library itself would. A text far longer than what is kept of it is read no
further than that takes: see `_begun`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tokenizers

from carpool.engine.affixes import NONE, Affixes
from carpool.engine.bounds import check_lengths, check_text, check_vocabulary
from carpool.engine.cutting import cut, cut_length, cut_pair, cut_second, give_way, halved_unevenly, head
from carpool.engine.errors import ConfigError, InvalidInput, InvalidParameter
from carpool.engine.framed import Framed
from carpool.engine.late_interaction import LateInteraction, Role, RoleText
from carpool.engine.outputs import Piece
from carpool.engine.params import Side, TokenizationParams
from carpool.engine.preparation import INLINE_CHARS
from carpool.engine.prepared import Prepared
from carpool.engine.roles import Scribe
from carpool.engine.words import Words

if TYPE_CHECKING:
    from carpool.engine.preparation import Prompts

Read = TypeVar("Read", bound=Sized)  # what is made of a text, of as many parts as it has tokens

_FIRST_LOOK = 8  # characters a token that are read at first; some four are common
_FURTHER = 8  # times as many, each time that too few tokens came of them
_SEAM = 64  # tokens at the end of a text's beginning that may be others in the whole text


class Tokenizer:
    """Wraps a fast tokenizer. All methods may be called from any thread at once."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        lowercase: bool = False,
        truncation_side: Side = "right",
        pad_id: int = 0,
        token_types: bool = True,
        pads: bool = False,
        scribes: Mapping[Role, Scribe] | None = None,
        leaves_out_prompts: bool = False,
    ) -> None:
        """`vocab_size` is the model's: ids at or above it have no embedding. `token_types`: the model tells the
        second text of a pair from the first. `pads`: prompts are filled up to `max_model_len`. `scribes` write the
        texts of a late interaction. `leaves_out_prompts`: what a text is prefixed with is not pooled."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._lowercase = lowercase
        self._side: Side = truncation_side
        self._pad_id = pad_id
        self._pads = pads
        self._affixes = Affixes.of_text(backend)
        self._pair_affixes, type_offset = Affixes.of_pair(backend)
        self._type_offset = type_offset if token_types else None
        self.scribes: Mapping[Role, Scribe] = scribes or {}
        self._leaves_out_prompts = leaves_out_prompts
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._words = Words(backend, vocabulary) if Words.fits(backend) else None
        # An added token may hold blanks: where a beginning ends in one, that comes apart into its bytes at most.
        added = backend.get_added_tokens_decoder().values()
        self._seam = max([_SEAM, *(len(token.content.encode()) for token in added)])
        # Tokens may have been added after the model was made: text can then name rows that it does not have.
        self._exceeds_model = max(vocabulary.values(), default=0) >= vocab_size

    @classmethod
    def of(
        cls, fast: Any, *, token_types: bool = True, late: LateInteraction | None = None, **options: Any
    ) -> Tokenizer:
        """From a tokenizer of transformers, whose rules it takes over; what becomes of `fast` later is its own."""
        backend = fast.backend_tokenizer
        mask = fast.eos_token_id if fast.mask_token_id is None else fast.mask_token_id
        writings = late.writings.items() if late else ()
        scribes = {role: Scribe.of(writing, backend.token_to_id, mask) for role, writing in writings}
        return cls(
            tokenizers.Tokenizer.from_str(backend.to_str()),
            truncation_side="left" if fast.truncation_side == "left" else "right",
            pad_id=fast.pad_token_id or 0,
            token_types=token_types and "token_type_ids" in fast.model_input_names,
            scribes=scribes,
            **options,
        )

    @property
    def expands_unseen(self) -> bool:
        """Whether queries are filled up with tokens that are not to be looked at."""
        return any(scribe.expands_unseen for scribe in self.scribes.values())

    # ── text to ids ──────────────────────────────────────────────────────────────────────────────────────

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, in full."""
        if self._lowercase:
            texts = [text.lower() for text in texts]
        try:
            if self._words is None:
                return self._by_library(texts, add_special_tokens)
            known = [self._words.encode(text) for text in texts]
            rest = [text for text, ids in zip(texts, known, strict=True) if ids is None]
            others = iter(self._by_library(rest, add_special_tokens) if rest else ())
        except (TypeError, UnicodeEncodeError):
            check_text(texts)
            raise
        around = self._affixes if add_special_tokens else NONE
        return [next(others) if ids is None else [*around.prefix, *ids, *around.suffix] for ids in known]

    def _by_library(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # A short text here and now: a batch goes to the library's threads, and is waited for. But only meanwhile others
        # can run Python, and a long text takes seconds.
        if len(texts) == 1 and len(texts[0]) <= INLINE_CHARS:
            return [self._backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def offsets(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Its ids, and the characters of the text that each stands for, from the first to behind the last."""
        check_text([text])
        own = text.lower() if self._lowercase else text
        if len(own) != len(text):
            raise InvalidInput("This text changes its length in lower case: its tokens have no place in it.")
        # A batch of one, as in `_by_library`; not the fast one, which knows no places.
        [encoding] = self._backend.encode_batch([own], add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def pieces(self, texts: list[str], add_special_tokens: bool = True) -> list[list[Piece]]:
        """Each text's tokens, and where in it each stands."""
        check_text(texts)
        whole = []
        for text in texts:
            ids, offsets = self.offsets(text, add_special_tokens)
            around = self._affixes if add_special_tokens else NONE
            inner = range(len(around.prefix), len(ids) - len(around.suffix))
            whole.append(
                [
                    Piece(token, text[start:stop], start, stop)
                    if i in inner
                    else Piece(token, self.tokens([token])[0], None, None)
                    for i, (token, (start, stop)) in enumerate(zip(ids, offsets, strict=True))
                ]
            )
        return whole

    def shorten(self, texts: list[str], limit: int) -> list[str]:
        """Each text cut, between characters, so that it has at most `limit` tokens (special ones not counted).

        What is cut comes in lower case, where the model wants that: it has its tokens of it.
        """
        check_text(texts)
        own = [text.lower() for text in texts] if self._lowercase else texts
        begun, encodings = self._begun(
            own, limit, lambda heads: self._backend.encode_batch(heads, add_special_tokens=False)
        )
        short = list(texts)
        for i, (beginning, encoding) in enumerate(zip(begun, encodings, strict=True)):
            # Cut in the middle of a word, or of a character of several tokens, the rest may be split anew.
            while len(encoding) > limit:
                end = min(encoding.offsets[limit - 1][1], encoding.offsets[limit][0], len(beginning) - 1)
                short[i] = beginning = beginning[:end]
                encoding = self._backend.encode(beginning, add_special_tokens=False)
        return short

    def _begun(
        self, texts: list[str], enough: int | None, read: Callable[[list[str]], Seq[Read]]
    ) -> tuple[list[str], Seq[Read]]:
        """A beginning of each text that has more than `enough` tokens, or the whole; and what `read` makes of it.

        A text far beyond what is asked of it would cost seconds and gigabytes. It is read up to the end of a word,
        and up to one far behind that where few tokens come of it (blanks, long words that become one unknown token).
        All tokens of a beginning are the whole text's first, but for the last `_seam`. `enough` None: all is read.
        """
        if enough is None:
            return texts, read(texts)
        wanted = enough + 1 + self._seam
        most = wanted * _FIRST_LOOK
        if max(map(len, texts), default=0) <= most:
            return texts, read(texts)
        check_text(texts)  # in full: what is not text is refused, also where nobody would have looked
        begun = [head(text, most) for text in texts]
        found = list(read(begun))
        while few := [
            i for i, text in enumerate(texts) if len(found[i]) < wanted and len(begun[i]) < len(text)
        ]:
            most *= _FURTHER
            further = [head(texts[i], most) for i in few]
            for i, beginning, tokens in zip(few, further, read(further), strict=True):
                begun[i], found[i] = beginning, tokens
        return begun, found

    def ids_of(self, words: Seq[str]) -> list[int]:
        """The id of each word, which must be one token."""
        found = [self._backend.token_to_id(word) for word in words]
        if None in found:
            raise ConfigError(f"{words[found.index(None)]!r} is not one token of this model's vocabulary.")
        return [token for token in found if token is not None]

    # ── prompts to ids that are fit to run ───────────────────────────────────────────────────────────────

    def prepare(self, prompts: Prompts, params: TokenizationParams, max_len: int | None = -1) -> Prepared:
        """Ids that are fit to run: cut, padded and checked as `params` and the model ask.

        `max_len`: the longest a prompt may be; -1 is what the model takes, None is no bound (it will be sliced).
        Raises the InvalidInput family; `param` is `input`, or `input[i]` when there are several prompts.
        """
        longest = self._max_model_len if max_len == -1 else max_len
        limit = cut_length(params.truncate_prompt_tokens, longest)
        type_starts: list[int | None] | None = None
        unseen: list[int | None] | None = None
        if prompts and isinstance(prompts[0], RoleText):
            batch, unseen = self._encode_roles(cast("list[RoleText]", prompts), params, limit, longest)
        elif prompts and isinstance(prompts[0], tuple):
            pairs = cast("list[tuple[str, str]]", prompts)
            batch, type_starts = self._encode_pairs(pairs, params, limit, longest)
        elif prompts and isinstance(prompts[0], Framed):
            batch = self._encode_framed(prompts, params, limit, longest)
        elif prompts and isinstance(prompts[0], str):
            batch = self._encode_enough(prompts, params, limit, longest)
            if limit is not None:
                batch = [self._truncate_text(ids, limit, params) for ids in batch]
        else:
            batch = cast("list[list[int]]", prompts)
            if limit is not None:
                batch = [cut(ids, limit, params.truncation_side or "right") for ids in batch]
        # What the tokenizer made of text need not be looked at, unless it knows more than the model.
        if self._exceeds_model or not (prompts and isinstance(prompts[0], str | tuple | Framed)):
            check_vocabulary(batch, self._vocab_size)
        check_lengths(batch, longest)
        if params.padding == "max_length" or (self._pads and params.padding is None):
            # A model that pads wants its own length, whatever else is allowed.
            full = self._max_model_len if self._pads or longest is None else min(longest, self._max_model_len)
            batch = [ids + [self._pad_id] * (full - len(ids)) for ids in batch]
        return Prepared(batch, type_starts, unseen, self._prompt_tokens(params))

    def _encode_enough(
        self, texts: list[str], params: TokenizationParams, limit: int | None, longest: int | None
    ) -> list[list[int]]:
        """Ids of each text; of a hopelessly long one only as many as decide what happens to it."""
        enough = self._enough(params, limit, longest)
        _, batch = self._begun(texts, enough, lambda begun: self.encode(begun, params.add_special_tokens))
        return list(batch)

    def _enough(self, params: TokenizationParams, limit: int | None, longest: int | None) -> int | None:
        """How many tokens decide what happens to a text: where its beginning has more they are too many, or, cut on the
        right, all that is kept. None: it has to be read to its end."""
        keeps_end = limit is not None and (params.truncation_side or self._side) == "left"
        return None if keeps_end else limit or longest

    def _truncate_text(self, ids: list[int], limit: int, params: TokenizationParams) -> list[int]:
        """To `limit` ids: sparing the special tokens by default, blindly when the caller chose a side."""
        blindly = params.truncation_side is not None or not params.add_special_tokens
        return cut(ids, limit, params.truncation_side or self._side, NONE if blindly else self._affixes)

    def _encode_roles(
        self, prompts: list[RoleText], params: TokenizationParams, limit: int | None, longest: int | None
    ) -> tuple[list[list[int]], list[int | None]]:
        """Each query and document as its scribe writes it, and from where on its tokens are not looked at."""
        check_text([prompt.text for prompt in prompts])  # by their places, not those among their role's
        batch: list[list[int]] = [[]] * len(prompts)
        unseen: list[int | None] = [None] * len(prompts)
        for role in dict.fromkeys(prompt.role for prompt in prompts):
            scribe = self.scribes.get(role, Scribe())
            places = [i for i, prompt in enumerate(prompts) if prompt.role == role]
            room = scribe.room(limit)
            texts = [scribe.prompt + prompts[i].text for i in places]
            encoded = self._encode_enough(texts, params, room, longest)
            for i, ids in zip(places, encoded, strict=True):
                kept = ids if room is None else self._truncate_text(ids, room, params)
                batch[i], unseen[i] = scribe.write(kept, self._max_model_len)
        return batch, unseen

    def _encode_pairs(
        self, pairs: list[tuple[str, str]], params: TokenizationParams, limit: int | None, longest: int | None
    ) -> tuple[list[list[int]], list[int | None]]:
        """Each pair as one prompt with the tokenizer's own separators, and where its type 1 begins.

        Each side is tokenised by itself. What is too long is cut where it is longest, or, where documents have a limit
        of their own, at the document.
        """
        shorter = cut_second if params.max_tokens_per_doc else cut_pair
        ids, begun = self._encode_distinct(
            (text for pair in pairs for text in pair), self._enough(params, limit, longest)
        )
        batch: list[list[int]] = []
        starts: list[int | None] = []
        for query, document in pairs:
            # As transformers has it: no text, no pair.
            around = self._pair_affixes if document else self._affixes
            first, second = ids[query], ids[document]
            if limit is not None and params.truncation_side is None and len(around) <= limit:
                room = limit - len(around)
                if shorter is cut_pair and halved_unevenly(first, second, room):
                    first, second = self._compared(query, document, ids, begun)
                first, second = shorter(first, second, room, self._side)
            whole = [*around.prefix, *first, *around.middle, *second, *around.suffix]
            start = len(whole)
            if self._type_offset is not None and document:
                start = len(around.prefix) + len(first) + self._type_offset
            if limit is not None and len(whole) > limit:
                gone = len(whole) - limit
                side = params.truncation_side or self._side
                whole = cut(whole, limit, side)
                start = max(0, start - gone) if side == "left" else start
            batch.append(whole)
            starts.append(start if start < len(whole) else None)
        return batch, starts

    def _encode_framed(
        self, prompts: list[Framed], params: TokenizationParams, limit: int | None, longest: int | None
    ) -> list[list[int]]:
        """Each prompt, its parts tokenised one by one, joined, and cut where it may be."""
        texts = (text for prompt in prompts for text in (*prompt.parts, prompt.tail))
        ids, _ = self._encode_distinct(texts, self._enough(params, limit, longest))
        batch = []
        for prompt in prompts:
            around = self._affixes if prompt.specials else NONE
            parts = [ids[part] for part in prompt.parts]
            if limit is not None and params.truncation_side != "left":
                parts = give_way(parts, prompt.yields, ids[prompt.tail], limit, len(around))
            whole = [*around.prefix, *(token for part in parts for token in part), *around.suffix]
            batch.append(whole if limit is None else cut(whole, limit, "left"))
        return batch

    def _encode_distinct(
        self, texts: Iterable[str], enough: int | None
    ) -> tuple[dict[str, list[int]], set[str]]:
        """Ids of each text by itself, tokenised once however often it comes: a query meets many documents.

        Of the texts in the set they are only the first, but more than `enough`.
        """
        distinct = list(dict.fromkeys(texts))
        beginnings, batch = self._begun(distinct, enough, lambda begun: self.encode(begun, False))
        begun = {text for text, own in zip(distinct, beginnings, strict=True) if len(own) < len(text)}
        ids = {
            text: own[: -self._seam] if text in begun else own
            for text, own in zip(distinct, batch, strict=True)
        }
        return ids, begun

    def _compared(
        self, first: str, second: str, ids: dict[str, list[int]], begun: set[str]
    ) -> tuple[list[int], list[int]]:
        """Ids of both, as many as tell which has more; `ids` and `begun`, from `_encode_distinct`, are kept up."""
        if min(first, second, key=lambda text: len(ids[text])) in begun:
            short, long = sorted((first, second), key=len)
            if short in begun:
                ids[short] = self.encode([short], False)[0]
                begun.discard(short)
            if long in begun and len(ids[long]) <= len(ids[short]):
                further, still_begun = self._encode_distinct([long], len(ids[short]))
                ids.update(further)
                begun.discard(long)
                begun |= still_begun
        return ids[first], ids[second]

    def _prompt_tokens(self, params: TokenizationParams) -> int:
        """How many tokens at the beginning are not pooled: the prompt's and those that the tokenizer puts before it."""
        if not (self._leaves_out_prompts and params.prompt):
            return 0
        if params.truncate_prompt_tokens is not None and (params.truncation_side or self._side) == "left":
            raise InvalidParameter(
                "This model leaves the prompt out of its pooling, so a text with a prompt cannot be cut on the left.",
                "truncation_side",
            )
        (ids,) = self.encode([params.prompt], params.add_special_tokens)
        return len(ids) - (len(self._affixes.suffix) if params.add_special_tokens else 0)

    # ── ids to text ──────────────────────────────────────────────────────────────────────────────────────

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; ids that no entry has are skipped."""
        known = [token for token in token_ids if self._is_known(token)]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def tokens(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's entry for each id; empty where there is none."""
        return [
            (self._backend.id_to_token(token) or "") if self._is_known(token) else "" for token in token_ids
        ]

    def _is_known(self, token: int) -> bool:
        """Whether the library can be asked about it: it raises for numbers that are not 32-bit."""
        return 0 <= token < self._backend.get_vocab_size(with_added_tokens=True)
