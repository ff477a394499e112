"""Every operation on packed rows in plain torch: the specification, the CPU path, and the tests' oracle.

Shapes: `T` tokens in the batch, `B` sequences, `N` heads, `D` head or output dimension, `H` hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length two batched matrix products and a softmax beat scaled_dot_product_attention on a CPU
# (its blocking has a fixed cost a head); measured in docs/log.md.
_SHORT = 96
# Scores held at once where they are held at all (16 MiB of float32): longer texts are done a block of rows at a time.
_SCORES = 1 << 22


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence of a packed row.

    query [T, N, D], key and value [T, N_kv, D] with N a multiple of N_kv; returns [T, N, D] in query's dtype.
    `runs` are (length, count): that many neighbouring sequences of that length; they add up to T.
    `window`: a token sees those less than `window` away (both sides, or the left one if causal).
    `softcap`: scores become softcap * tanh(score / softcap) (Gemma 2).
    `bias` [N, 2M - 1], M at least the longest length: what is then added to head n's score of a key that stands d
    tokens behind its query is bias[n, M - 1 + d] (T5, MPNet, ALiBi).
    `sinks` [N]: the score of one more key, which takes its share of the weights and has no value (GPT-OSS).
    Scores, softmax and sums are float32: for 16-bit inputs this is both more exact and, on a CPU, faster.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    holds_scores = softcap is not None or bias is not None or sinks is not None
    out = torch.empty_like(query, dtype=torch.float32)
    for rows, length, count in _spans(runs):
        q, k, v = (_batch(x[rows], count) for x in (query, key, value))
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        step = _rows_at_once(length, count * heads) if holds_scores else length
        results = out[rows].view(count, length, heads, -1).transpose(1, 2)
        for first in range(0, length, step):
            last = min(first + step, length)
            mask = _mask(first, last, length, causal, window, query.device)
            added = None if bias is None else _by_distance(bias.float(), first, last, length)
            results[:, :, first:last] = _attend(q[:, :, first:last], k, v, mask, scale, softcap, added, sinks)
    return out.to(query.dtype)


def attention_to_first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: int,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within one sequence, of all its tokens to its first `seen`; else as `varlen_attention`.

    query [L, N, D], key and value [L, N_kv, D]; returns [L, N, D] in query's dtype. A token that sees none of them gets
    nothing: zeros.
    """
    length, heads, kv_heads = len(query), query.shape[1], key.shape[1]
    q, k, v = (_batch(x, 1) for x in (query, key[:seen], value[:seen]))
    if heads != kv_heads:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    mask = _mask(0, length, length, causal, window, query.device)
    mask = None if mask is None else mask[:, :seen]
    added = None if bias is None else _by_distance(bias.float(), 0, length, length)[..., :seen]
    out = _attend(q, k, v, mask, scale, softcap, added, sinks)[0].transpose(0, 1)
    if mask is not None:
        out = torch.where(mask.any(1)[:, None, None], out, 0)
    return out.to(query.dtype)


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    rows_of: Tensor,
    on_host: Sequence[int] | None = None,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
) -> Tensor:
    """Attention of contents and relative positions within each sequence of a packed row (DeBERTa).

    query, key and value [T, N, D]; position_keys and position_queries [P, N, D], either may be None; returns [T, N, D]
    in query's dtype. With r the row of those tables for a key's distance from its query, a score is
    scale * (query·key + query·position_keys[r] + key·position_queries[r]).
    `rows_of` int64 [2M - 1], nowhere rising, M at least the longest length: r = rows_of[M - 1 + d] for a
    key that stands d tokens behind its query. `on_host`: the same where the host need not wait for it.
    """
    heads = query.shape[1]
    row = rows_of.tolist() if on_host is None else on_host
    out = torch.empty_like(query, dtype=torch.float32)
    keys, queries = (
        None if x is None else x.float().transpose(0, 1) for x in (position_keys, position_queries)
    )
    for rows, length, count in _spans(runs):
        q, k, v = (_batch(x[rows], count) for x in (query, key, value))
        # Of the tables only what this length can reach: for short texts that is a small part.
        middle = len(rows_of) // 2
        low, high = row[middle + length - 1], row[middle - length + 1] + 1
        reach = (rows_of - low)[None]
        # [count, N, L, high - low]
        by_key = None if queries is None else k @ queries[:, low:high].transpose(1, 2)
        step = _rows_at_once(length, count * heads)
        results = out[rows].view(count, length, heads, -1).transpose(1, 2)
        for first in range(0, length, step):
            last = min(first + step, length)
            q_rows = q[:, :, first:last]
            index = _by_distance(reach, first, last, length).expand(count, heads, -1, -1)
            scores = q_rows @ k.transpose(2, 3)  # [count, N, rows, L], as the index
            if keys is not None:
                scores = scores + (q_rows @ keys[:, low:high].transpose(1, 2)).gather(3, index)
            if by_key is not None:
                scores = scores + by_key.gather(3, index.transpose(2, 3)).transpose(2, 3)
            results[:, :, first:last] = torch.softmax(scores * scale, dim=-1) @ v
    return out.to(query.dtype)


def _spans(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Where in the row each run lies, its length and its count."""
    start = 0
    for length, count in runs:
        yield slice(start, start + length * count), length, count
        start += length * count


def _batch(rows: Tensor, count: int) -> Tensor:
    """[count * L, N, D] → float32 [count, N, L, D]."""
    return rows.float().view(count, -1, rows.shape[1], rows.shape[2]).transpose(1, 2)


def _rows_at_once(length: int, matrices: int) -> int:
    """How many rows of that many matrices of scores [L, L] to compute at a time."""
    return max(1, _SCORES // (matrices * length))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """q [count, N, rows, D], k and v [count, N, L, D] float32 → [count, N, rows, D].

    mask bool [rows, L] is True where a query sees a key; bias [N, rows, L]; sinks [N].
    """
    plain = softcap is None and bias is None and sinks is None
    if plain and (mask is not None or q.shape[2] > _SHORT):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.matmul(torch.softmax(torch.cat([scores, sink], -1), dim=-1)[..., :-1], v)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def _by_distance(values: Tensor, first: int, last: int, length: int) -> Tensor:
    """values [N, 2M - 1] by how far a key stands behind its query → [N, rows, L] for the queries first to last."""
    middle = values.shape[1] // 2
    if values.shape[1] % 2 == 0 or middle < length - 1:
        raise ValueError(f"{values.shape[1]} distances do not cover a text of {length} tokens")
    return values.unfold(1, length, 1)[:, middle - last + 1 : middle - first + 1].flip(1)


def _mask(
    first: int, last: int, length: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """bool [rows, L] for the queries first to last, or None when every token sees every token."""
    if not causal and (window is None or window >= length):
        return None
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(length, device=device)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & (distance.abs() < window)
    return mask


def segment_ids(cu_seqlens: Tensor, tokens: int | None = None) -> Tensor:
    """int64 [T]: which sequence each token belongs to. cu_seqlens int [B+1], whose last is `tokens`, if known."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=tokens
    )


def pool_cls(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence: [T, H] → float32 [B, H]."""
    return hidden[cu_seqlens[:-1].long()].float()


def pool_last(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last row of each sequence: [T, H] → float32 [B, H]."""
    return hidden[cu_seqlens[1:].long() - 1].float()


def pool_sum(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows: [T, H] → float32 [B, H]."""
    sums = hidden.new_zeros((len(cu_seqlens) - 1, hidden.shape[1]), dtype=torch.float32)
    return sums.index_add_(0, segment_ids(cu_seqlens, len(hidden)), hidden.float())


def pool_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's rows, summed in float32: [T, H] → float32 [B, H]."""
    return pool_sum(hidden, cu_seqlens) / cu_seqlens.diff()[:, None]


def pool_mean_sqrt_len(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows over the root of its length: [T, H] → float32 [B, H]."""
    return pool_sum(hidden, cu_seqlens) / cu_seqlens.diff()[:, None].sqrt()


def pool_weighted_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's rows, the i-th (from 1) weighted by i: [T, H] → float32 [B, H]."""
    owner = segment_ids(cu_seqlens, len(hidden))
    weight = torch.arange(1, len(owner) + 1, device=hidden.device) - cu_seqlens[:-1].long()[owner]
    lengths = cu_seqlens.diff().float()
    return pool_sum(hidden.float() * weight[:, None], cu_seqlens) / (lengths * (lengths + 1) / 2)[:, None]


def pool_max(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The largest of each component over each sequence: [T, H] → float32 [B, H]."""
    top = hidden.new_full((len(cu_seqlens) - 1, hidden.shape[1]), float("-inf"), dtype=torch.float32)
    index = segment_ids(cu_seqlens, len(hidden))[:, None].expand(-1, hidden.shape[1])
    return top.scatter_reduce_(0, index, hidden.float(), "amax")


def cut_and_normalize(vectors: Tensor, widths: Tensor, normalize: Tensor) -> Tensor:
    """Matryoshka: row i keeps its first widths[i] components (the rest become 0), then gets unit length if asked.

    vectors float32 [B, D], widths int64 [B], normalize bool [B] → float32 [B, D]. L2 with eps 1e-12.
    """
    looks = vectors.device.type == "cpu"  # elsewhere the host would wait for the answer
    if not looks or int(widths.min()) < vectors.shape[1]:
        column = torch.arange(vectors.shape[1], device=vectors.device)
        vectors = vectors.masked_fill(column[None, :] >= widths[:, None], 0.0)
    if looks and not normalize.any():
        return vectors
    length = vectors.norm(dim=1).clamp_min(1e-12)
    return vectors / torch.where(normalize, length, torch.ones_like(length))[:, None]


# ── what the CUDA kernels compute: one name and signature here and in kernels/cuda_ops.py ──────────────────────────

CLS, LAST, MEAN = range(3)  # modes of `pool_rows`
IDENTITY, SIGMOID, SOFTMAX = range(3)  # kinds of `activate_rows`
Output = Literal["float32", "float16", "bfloat16", "int8", "binary"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


def pool_rows(
    hidden: Tensor,
    cu_seqlens: Tensor,
    modes: Tensor,
    widths: Tensor,
    normalize: Tensor,
    output: Output = "float32",
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sequence's first row, last row or mean, cut, normalised and cast, as its own `modes`, `widths` and
    `normalize` say.

    hidden [T, H], cu_seqlens int32 [B+1]; int8 modes, int32 widths (0 to H) and bool normalize [B] → rows and float32
    scales [B], as `finish_rows` makes them. A sequence of no tokens gives zeros. `longest`: the most tokens of a
    sequence, if known; how a device shares out the work may depend on it, the result does not.
    """
    lengths = cu_seqlens.diff().long()
    mode = _shared(modes)
    if mode is not None and int(lengths.min()) > 0:
        pooled = (pool_cls, pool_last, pool_mean)[mode](hidden, cu_seqlens)
    else:
        pooled = pool_sum(hidden, cu_seqlens) / lengths.clamp_min(1)[:, None]
        for mode, places in ((CLS, cu_seqlens[:-1].long()), (LAST, cu_seqlens[1:].long() - 1)):
            chosen = (modes == mode) & (lengths > 0)
            if len(hidden):
                rows = hidden[places.clamp(0, len(hidden) - 1)].float()
                pooled = torch.where(chosen[:, None], rows, pooled)
    return finish_rows(pooled, widths, normalize, output)


def _shared(values: Tensor) -> int | None:
    """What all of them are; None if they differ, are none, or lie where the host would wait for the answer."""
    if values.device.type != "cpu" or not len(values):
        return None
    low, high = values.aminmax()
    return int(low) if low == high else None


def finish_rows(vectors: Tensor, widths: Tensor, normalize: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """Cut and normalise float32 rows [R, H], then cast: rows and float32 scales [R].

    int32 widths and bool normalize [R]. int8 [R, H] are whole numbers from -127 to 127, to be multiplied by their row's
    scale; scales are 1 for all other outputs. binary is uint8 [R, ceil(H / 8)]: a bit a component, the first one the
    highest, set from 0 upwards and for none from the width on.
    """
    ones = vectors.new_ones(len(vectors))
    if not len(vectors):
        size = -(-vectors.shape[1] // 8) if output == "binary" else vectors.shape[1]
        return vectors.new_empty((0, size), dtype=OUTPUTS[output]), ones
    finished = cut_and_normalize(vectors, widths.long(), normalize)
    if output == "int8":
        most = finished.abs().amax(1)
        # The whole numbers are of the row before it got its length, so that they are rounded once only.
        cut = cut_and_normalize(vectors, widths.long(), torch.zeros_like(normalize))
        factor = 127 / cut.abs().amax(1).clamp_min(1e-30)
        return (cut * factor[:, None]).round().nan_to_num(0).clamp(-127, 127).to(torch.int8), most / 127
    if output == "binary":
        column = torch.arange(vectors.shape[1], device=vectors.device)
        bits = (finished >= 0) & (column[None, :] < widths[:, None])
        bits = F.pad(bits, (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
        weight = 2 ** torch.arange(7, -1, -1, device=vectors.device)
        return (bits * weight).sum(2).to(torch.uint8), ones
    return finished.to(OUTPUTS[output]), ones


OUTPUTS: Mapping[Output, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "binary": torch.uint8,
}


def gather_rows(
    hidden: Tensor, rows: Tensor | None, widths: Tensor, normalize: Tensor, output: Output = "float32"
) -> tuple[Tensor, Tensor]:
    """Single rows of hidden [T, H], int32 `rows` [R] or None for all of them; else as `finish_rows`."""
    chosen = hidden if rows is None else hidden[rows.long()]
    return finish_rows(chosen.float(), widths, normalize, output)


def step_rows(token_ids: Tensor, cu_seqlens: Tensor, tag: int) -> tuple[Tensor, Tensor]:
    """Where the tokens `tag` are: int64 token_ids [T], cu_seqlens int32 [B+1] → int32 rows [R], bounds [B+1].

    The rows of sequence b are those from bounds[b] to bounds[b+1].
    """
    hits = token_ids == tag
    before = F.pad(hits.cumsum(0), (1, 0))
    return hits.nonzero()[:, 0].int(), before[cu_seqlens.long()].int()


def activate_rows(logits: Tensor, kinds: Tensor, mean: float = 0.0, sigma: float = 1.0) -> Tensor:
    """logits [R, C], int8 kinds [R] → float32 [R, C]: (logit - mean) / sigma; its sigmoid; or the row's softmax."""
    plain = (logits.float() - mean) / sigma
    shared = _shared(kinds)
    if shared is not None:
        return plain if shared == IDENTITY else (plain.sigmoid() if shared == SIGMOID else plain.softmax(1))
    kind = kinds[:, None]
    activated = torch.where(kind == SIGMOID, torch.sigmoid(plain), torch.softmax(plain, dim=1))
    return torch.where(kind == IDENTITY, plain, activated)


def sparse_rows(logits: Tensor, cu_seqlens: Tensor, *, sums: bool = False, twice: bool = False) -> Tensor:
    """SPLADE: logits [T, V], cu_seqlens int32 [B+1] → float32 [B, V], over each sequence's tokens the largest
    log(1 + relu(logit)), or their sum; `twice` takes the logarithm twice. A sequence of no tokens gives zeros.
    """

    def squash(weights: Tensor) -> Tensor:
        weights = weights.log1p()
        return weights.log1p() if twice else weights

    pooled = logits.new_zeros(len(cu_seqlens) - 1, logits.shape[1], dtype=torch.float32)
    if logits.device.type == "cpu":  # a slice a text, since looking at the bounds costs nothing
        for row, (start, end) in zip(pooled, pairwise(cu_seqlens.tolist()), strict=True):
            if start < end:
                weights = torch.relu(logits[start:end].float())
                row.copy_(squash(weights).sum(0) if sums else weights.amax(0))
        return pooled if sums else squash(pooled)  # of a maximum, the logarithm can be taken last
    weights = squash(torch.relu(logits.float()))
    index = segment_ids(cu_seqlens, len(logits))[:, None].expand(-1, logits.shape[1])
    return pooled.scatter_reduce_(0, index, weights, "sum" if sums else "amax")


def cosine_pairs(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosines of rows in_a[p] of a [A, H] and in_b[p] of b [B, H]: int32 [P] each → float32 [P]."""
    one, other = a.float()[in_a.long()], b.float()[in_b.long()]
    cosine: Tensor = (one * other).sum(1) / one.norm(dim=1).clamp_min(eps) / other.norm(dim=1).clamp_min(eps)
    return cosine


def maxsim(
    queries: Tensor,
    query_bounds: Tensor,
    documents: Tensor,
    document_bounds: Tensor,
    in_queries: Tensor,
    in_documents: Tensor,
) -> Tensor:
    """Late interaction: over a query's tokens the sum of the largest product with a token of the document.

    queries [Q, H] and documents [D, H] packed, with int32 bounds of one more than there are of each; pairs are
    in_queries and in_documents, int32 [P] → float32 [P]. 0 where either has no tokens.
    """
    of_query, of_document = query_bounds.tolist(), document_bounds.tolist()
    scores = queries.new_zeros(len(in_queries), dtype=torch.float32)
    for pair, (q, d) in enumerate(zip(in_queries.tolist(), in_documents.tolist(), strict=True)):
        query = queries[of_query[q] : of_query[q + 1]].float()
        document = documents[of_document[d] : of_document[d + 1]].float()
        if len(query) and len(document):
            scores[pair] = (query @ document.T).amax(1).sum()
    return scores


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """x [R, H] plus the residual, in x's dtype, and its norm times weight plus bias, float32 [H] each, in x's dtype.

    `centred`: LayerNorm, else RMSNorm. Returns (norm, sum); the sum is x itself where there is no residual, and
    None where it is not to be kept.
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    if centred:
        wide = wide - wide.mean(1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype), total if keep_sum else None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of packed heads: x [T, N, D], cos and sin [T, R], float32 or of x's dtype → [T, N, D].

    The left half of the first R columns is turned into the right one; the columns from R on stay as they are.
    """
    turned = cos.shape[1]
    head, rest = x[..., :turned].float(), x[..., turned:]
    cosine, sine = cos.float()[:, None], sin.float()[:, None]
    left, right = head.chunk(2, -1)
    out = head * cosine + torch.cat((-right, left), -1) * sine
    return torch.cat((out.to(x.dtype), rest), -1)


def gated(both: Tensor, activation: Activation, *, gate_first: bool = True) -> Tensor:
    """activation(gate) * up: both [R, 2F], gate and up beside each other → [R, F] in its dtype."""
    one, other = both.float().chunk(2, -1)
    gate, up = (one, other) if gate_first else (other, one)
    if activation == "silu":
        return (F.silu(gate) * up).to(both.dtype)
    return (F.gelu(gate, approximate="none" if activation == "gelu" else "tanh") * up).to(both.dtype)


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Into both caches [P, S, N, D], P pages of S tokens: keys and values [T, N, D] at int64 slots [T].

    A slot is page * S + place, no two the same; a token whose slot is below 0 or behind the end is left out.
    """
    size = key_cache.shape[1]
    kept = (slots >= 0) & (slots < len(key_cache) * size)
    page, place = slots[kept] // size, slots[kept] % size
    key_cache[page, place], value_cache[page, place] = keys[kept], values[kept]


def kv_gather(
    key_cache: Tensor, value_cache: Tensor, pages: Tensor, cu_seqlens: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Out of both caches [P, S, N, D] into packed rows [T, N, D]: int32 pages [B, M] of each sequence in order,
    cu_seqlens int32 [B+1], whose last is `tokens`.
    """
    size, owner = key_cache.shape[1], segment_ids(cu_seqlens)
    place = torch.arange(tokens, device=owner.device) - cu_seqlens[:-1].long()[owner]
    page = pages[owner, place // size].long()
    return key_cache[page, place % size], value_cache[page, place % size]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """`varlen_attention` of sequences that only the device knows: cu_seqlens int32 [B+1], the most tokens of one.

    seen int32 [B]: all tokens of a sequence look at its first so many only (`attention_to_first`).
    """
    lengths: list[int] = cu_seqlens.diff().tolist()
    assert max(lengths, default=0) <= longest
    kind: dict[str, Any] = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap, "bias": bias, "sinks": sinks
    }  # fmt: skip
    runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
    out = varlen_attention(query, key, value, runs, **kind)
    if seen is not None:
        starts: list[int] = cu_seqlens.tolist()
        for start, length, first in zip(starts, lengths, seen.tolist(), strict=False):
            if first < length:
                own = slice(start, start + length)
                out[own] = attention_to_first(query[own], key[own], value[own], first, **kind) if first else 0
    return out


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pages: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens to all that it has so far, whose keys and values are in pages.

    query [T, N, D], of sequences with cu_seqlens int32 [B+1], the longest of `longest`; caches [P, S, N_kv, D], int32
    pages [B, M] of each sequence in order; int32 key_lengths [B], the queries' own tokens counted; returns [T, N, D] in
    query's dtype. `window`, `softcap` and `sinks` as in `varlen_attention`.
    """
    out = torch.empty_like(query)
    bounds, size = cu_seqlens.tolist(), key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    for own, (start, end), length in zip(pages, pairwise(bounds), key_lengths.tolist(), strict=True):
        assert end - start <= min(longest, length)
        if start == end:
            continue
        place = torch.arange(length, device=query.device)
        page = own[place // size].long()
        keys, values = (
            cache[page, place % size].repeat_interleave(group, dim=1) for cache in (key_cache, value_cache)
        )
        mask = _mask(length - (end - start), length, length, True, window, query.device)
        q, k, v = (_batch(x, 1) for x in (query[start:end], keys, values))
        out[start:end] = _attend(q, k, v, mask, scale, softcap, None, sinks)[0].transpose(0, 1)
    return out
