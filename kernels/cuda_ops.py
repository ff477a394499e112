"""The operations of `kernels.reference` on a CUDA device, under their names and with their signatures.

Each checks what its kernel takes for granted, makes the outputs and launches. Values that are on the device, such as
bounds and indices, are trusted: to look at them would make the host wait for it. What a kernel cannot take is a
LaunchError, and for the twin to do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels import cuda_table, launch
from carpool.kernels.launch import ELEMENTS, LaunchError
from carpool.kernels.reference import OUTPUTS, Activation, Output

WIDEST = 8192  # columns of a row that a block holds in shared memory
LONG = 512  # tokens from which on a sequence's mean is taken in two passes
_EPS = 1e-12
_FAR = 1 << 30  # tokens: farther than any sequence is long


def pool_rows(
    hidden: Tensor,
    cu_seqlens: Tensor,
    modes: Tensor,
    widths: Tensor,
    normalize: Tensor,
    output: Output = "float32",
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.pool_rows`."""
    tokens, columns = _rows("hidden", hidden)
    count = _bounds(cu_seqlens)
    _flat(count, modes=modes, widths=widths, normalize=normalize)
    out, scales = _outputs(count, columns, output, hidden.device)
    if not count:
        return out, scales
    element = _element("hidden", hidden)
    kernel = cuda_table.BY_NAME["pool_rows"]
    shared = cuda_table.pooling_shared(columns, 16 // hidden.element_size(), kernel.threads)
    partial = None
    if longest is not None and longest > LONG:
        chunks = tokens // cuda_table.CHUNK + count
        partial = hidden.new_empty((chunks, columns), dtype=torch.float32)
        launch.run(
            "pool_split", (element,), (chunks,),
            hidden, cu_seqlens, modes, widths, partial, count, columns,
            shared=shared,
        )  # fmt: skip
        shared = max(shared, cuda_table.pooling_shared(columns, 4, kernel.threads))
    launch.run(
        "pool_rows", (element, ELEMENTS[out.dtype]), (count,),
        hidden, cu_seqlens, modes, widths, normalize, partial, out, scales, columns, _EPS,
        shared=shared,
    )  # fmt: skip
    return out, scales


def gather_rows(
    hidden: Tensor, rows: Tensor | None, widths: Tensor, normalize: Tensor, output: Output = "float32"
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.gather_rows`."""
    tokens, columns = _rows("hidden", hidden, aligned=False)
    count = tokens if rows is None else len(rows)
    _flat(count, widths=widths, normalize=normalize)
    if rows is not None:
        _flat(count, rows=rows)
    out, scales = _outputs(count, columns, output, hidden.device)
    if count:
        launch.run(
            "gather_rows", (_element("hidden", hidden), ELEMENTS[out.dtype]), _a_warp_each("gather_rows", count),
            hidden, rows, widths, normalize, out, scales, count, columns, _EPS,
        )  # fmt: skip
    return out, scales


def step_rows(token_ids: Tensor, cu_seqlens: Tensor, tag: int) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.step_rows`. The host waits for the device once: it must know how many there are."""
    count = _bounds(cu_seqlens)
    _flat(len(token_ids), token_ids=token_ids)
    bounds = torch.zeros(count + 1, dtype=torch.int32, device=token_ids.device)
    if not count:
        return bounds[:0], bounds
    grid = _a_warp_each("step_count", count)
    counts = torch.empty(count, dtype=torch.int32, device=token_ids.device)
    launch.run("step_count", (), grid, token_ids, cu_seqlens, counts, count, tag)
    torch.cumsum(counts, 0, dtype=torch.int32, out=bounds[1:])
    rows = torch.empty(int(bounds[-1]), dtype=torch.int32, device=token_ids.device)
    if len(rows):
        launch.run("step_fill", (), grid, token_ids, cu_seqlens, bounds, rows, count, tag)
    return rows, bounds


def activate_rows(logits: Tensor, kinds: Tensor, mean: float = 0.0, sigma: float = 1.0) -> Tensor:
    """See `kernels.reference.activate_rows`."""
    rows, columns = _rows("logits", logits, aligned=False)
    _flat(rows, kinds=kinds)
    out = torch.empty_like(logits, dtype=torch.float32)
    if rows:
        grid = _a_warp_each("activate_rows", rows)
        launch.run(
            "activate_rows",
            (_element("logits", logits),),
            grid,
            logits,
            kinds,
            out,
            rows,
            columns,
            mean,
            sigma,
        )
    return out


def sparse_rows(logits: Tensor, cu_seqlens: Tensor, *, sums: bool = False, twice: bool = False) -> Tensor:
    """See `kernels.reference.sparse_rows`."""
    _, columns = _rows("logits", logits, aligned=False)
    count = _bounds(cu_seqlens)
    out = torch.empty((count, columns), dtype=torch.float32, device=logits.device)
    if count:
        grid = (-(-columns // cuda_table.BY_NAME["sparse_rows"].threads), count)
        launch.run(
            "sparse_rows", (_element("logits", logits),), grid,
            logits, cu_seqlens, out, columns, int(sums), int(twice),
        )  # fmt: skip
    return out


def cosine_pairs(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, eps: float = 1e-8) -> Tensor:
    """See `kernels.reference.cosine_pairs`."""
    columns = _alike(a, b)
    count = len(in_a)
    _flat(count, in_a=in_a, in_b=in_b)
    out = torch.empty(count, dtype=torch.float32, device=a.device)
    if count:
        grid = _a_warp_each("cosine_pairs", count)
        launch.run("cosine_pairs", (_element("a", a),), grid, a, b, in_a, in_b, out, count, columns, eps)
    return out


def maxsim(
    queries: Tensor,
    query_bounds: Tensor,
    documents: Tensor,
    document_bounds: Tensor,
    in_queries: Tensor,
    in_documents: Tensor,
) -> Tensor:
    """See `kernels.reference.maxsim`."""
    columns = _alike(queries, documents)
    _bounds(query_bounds), _bounds(document_bounds)
    count = len(in_queries)
    _flat(count, in_queries=in_queries, in_documents=in_documents)
    out = torch.empty(count, dtype=torch.float32, device=queries.device)
    if count:
        launch.run(
            "maxsim", (_element("queries", queries),), (count,),
            queries, query_bounds, documents, document_bounds, in_queries, in_documents, out, columns,
        )  # fmt: skip
    return out


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
    """See `kernels.reference.norm_rows`."""
    rows, columns = _rows("x", x)
    if residual is not None:
        _alike(x, residual)
        if len(residual) != rows:
            raise LaunchError(f"residual has {len(residual)} rows, x has {rows}")
    _flat(columns, weight=weight)
    if bias is not None:
        _flat(columns, bias=bias)
    out, total = torch.empty_like(x), None
    if keep_sum:
        total = x if residual is None else torch.empty_like(x)
    if rows:
        launch.run(
            "norm_rows", (_element("x", x),), (rows,),
            x, residual, weight, bias, out, None if residual is None else total, columns, int(centred), eps,
            shared=4 * columns,
        )  # fmt: skip
    return out, total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `kernels.reference.rotary`. x may be a view of a wider row, its heads without gaps."""
    tokens, heads, size = x.shape
    turned = cos.shape[1]
    gaps = heads > 1 and x.stride(1) != size  # the stride of one head's dimension is anything
    if x.stride(2) != 1 or gaps or cos.shape != (tokens, turned) or sin.shape != cos.shape:
        raise LaunchError(f"x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit")
    if turned % 2 or not 0 < turned <= size or not cos.is_contiguous() or not sin.is_contiguous():
        raise LaunchError(f"{turned} columns of {size} cannot be turned")
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    if out.numel():
        types = _element("x", x), _element("cos", cos)
        if types[1] not in ("float", types[0]):
            raise LaunchError(f"cos and sin must be float32 or {x.dtype}, got {cos.dtype}")
        grid = _a_thread_each("rotary", tokens * heads * (size - turned // 2))
        launch.run("rotary", types, grid, x, cos, sin, out, tokens, heads, size, turned, x.stride(0))
    return out


def gated(both: Tensor, activation: Activation, *, gate_first: bool = True) -> Tensor:
    """See `kernels.reference.gated`."""
    rows, columns = _rows("both", both, widest=None)
    vector = 16 // both.element_size()
    if columns % (2 * vector):
        raise LaunchError(f"each half must be whole 16 bytes, got {columns} columns in all")
    out = torch.empty((rows, columns // 2), dtype=both.dtype, device=both.device)
    if rows:
        grid = _a_thread_each("gated", out.numel() // vector)
        number = ("silu", "gelu", "gelu_tanh").index(activation)
        launch.run(
            "gated", (_element("both", both),), grid, both, out, rows, columns // 2, number, int(gate_first)
        )
    return out


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """See `kernels.reference.kv_write`."""
    units = _caches(key_cache, value_cache)
    for name, packed in (("keys", keys), ("values", values)):
        if packed.shape[1:] != key_cache.shape[2:] or packed.dtype != key_cache.dtype:
            raise LaunchError(f"{name} {tuple(packed.shape)} do not fit caches {tuple(key_cache.shape)}")
        if not packed.is_contiguous() or len(packed) != len(slots):
            raise LaunchError(f"{name} must be [{len(slots)}, N, D] without gaps")
    _flat(len(slots), slots=slots)
    if len(slots):
        capacity = key_cache.shape[0] * key_cache.shape[1]
        grid = _a_thread_each("kv_write", len(slots) * units)
        launch.run(
            "kv_write", (), grid, keys, values, slots, key_cache, value_cache, len(slots), capacity, units
        )


def kv_gather(
    key_cache: Tensor, value_cache: Tensor, pages: Tensor, cu_seqlens: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.kv_gather`."""
    units = _caches(key_cache, value_cache)
    count = _bounds(cu_seqlens)
    if pages.ndim != 2 or len(pages) != count or not pages.is_contiguous():
        raise LaunchError(f"pages must be [{count}, M], got {tuple(pages.shape)}")
    keys, values = (
        torch.empty((tokens, *cache.shape[2:]), dtype=cache.dtype, device=cache.device)
        for cache in (key_cache, value_cache)
    )
    if tokens and count:
        launch.run(
            "kv_gather", (), _a_thread_each("kv_gather", tokens * units),
            key_cache, value_cache, pages, cu_seqlens, keys, values,
            tokens, count, pages.shape[1], key_cache.shape[1], units,
        )  # fmt: skip
    return keys, values


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
    """See `kernels.reference.packed_attention`. All three may be views of a fused row, without gaps in a head."""
    count = _bounds(cu_seqlens)
    for name, rows in (("key", key), ("value", value)):
        if len(rows) != len(query):
            raise LaunchError(f"{name} has {len(rows)} tokens, query has {len(query)}")
    if bias is not None:
        if bias.ndim != 2 or len(bias) != query.shape[1] or bias.shape[1] % 2 == 0:
            raise LaunchError(f"bias must be [{query.shape[1]}, 2M - 1], got {tuple(bias.shape)}")
        if bias.shape[1] < 2 * longest - 1:
            raise LaunchError(f"{bias.shape[1]} distances do not cover a text of {longest} tokens")
    if seen is not None:
        _flat(count, seen=seen)
    return _attention(
        query, key, value, cu_seqlens, None, None, seen, bias, sinks,
        scale=scale, causal=causal, window=window, softcap=softcap, page_size=1,
    )  # fmt: skip


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
    """See `kernels.reference.paged_attention`."""
    count = _bounds(cu_seqlens)
    _caches(key_cache, value_cache)
    _flat(count, key_lengths=key_lengths)
    if pages.ndim != 2 or len(pages) != count or not pages.is_contiguous():
        raise LaunchError(f"pages must be [{count}, M], got {tuple(pages.shape)}")
    return _attention(
        query, key_cache.flatten(0, 1), value_cache.flatten(0, 1), cu_seqlens, key_lengths, pages, None, None, sinks,
        scale=scale, causal=True, window=window, softcap=softcap, page_size=key_cache.shape[1],
    )  # fmt: skip


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
    pages: Tensor | None,
    seen: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    page_size: int,
) -> Tensor:
    """query [T, N, D], key and value [., N_kv, D] → [T, N, D]. The grid follows from T and B, which the host knows."""
    tokens, heads, size = query.shape
    element, vector = _element("query", query), 16 // query.element_size()
    width = next((width for width in cuda_table.ATTENTION if size <= width), None)
    if width is None or size % vector:
        raise LaunchError(f"a head must be whole 16 bytes and at most 256 columns wide, got {size}")
    for name, rows in (("query", query), ("key", key), ("value", value)):
        whole = all(
            n == 1 or step % vector == 0 for n, step in zip(rows.shape[:2], rows.stride()[:2], strict=True)
        )
        if not whole or rows.stride(2) != 1 or rows.data_ptr() % 16:
            raise LaunchError(
                f"{name}: heads must be whole 16 bytes, aligned to them, without gaps in a head"
            )
        if rows.dtype != query.dtype or rows.shape[2] != size:
            raise LaunchError(
                f"{name} {tuple(rows.shape)} {rows.dtype} does not fit {size} columns of {query.dtype}"
            )
    if key.shape != value.shape:
        raise LaunchError(f"key {tuple(key.shape)} and value {tuple(value.shape)} are not alike")
    if not key.shape[1] or heads % key.shape[1]:
        raise LaunchError(f"{heads} heads do not share out {key.shape[1]} of keys")
    if window is not None and window < 1:
        raise LaunchError(f"a window must be at least 1, got {window}")
    if sinks is not None:
        _flat(heads, sinks=sinks)
    out = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    reach = _FAR if window is None else min(window - 1, _FAR)
    grid = (tokens // cuda_table.ATTENTION[width] + len(cu_seqlens) - 1, heads)
    launch.run(
        "attention", (element, str(width)), grid,
        query, key, value, out, cu_seqlens, key_lengths, pages, seen,
        None if bias is None else bias.float().contiguous(), None if sinks is None else sinks.float(),
        len(cu_seqlens) - 1, heads // key.shape[1], size,
        0 if pages is None else pages.shape[1], page_size, 0 if bias is None else bias.shape[1],
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        reach, 0 if causal else reach, scale, softcap or 0.0,
    )  # fmt: skip
    return out


def _rows(name: str, rows: Tensor, *, aligned: bool = True, widest: int | None = WIDEST) -> tuple[int, int]:
    """How many and how wide: [R, H]. Where a kernel reads vectors of 16 bytes, rows are `aligned` to them."""
    if rows.ndim != 2 or not rows.is_contiguous() or not rows.shape[1]:
        raise LaunchError(f"{name} must be [R, H] without gaps, got {tuple(rows.shape)}")
    columns = rows.shape[1]
    if aligned and (columns * rows.element_size() % 16 or rows.data_ptr() % 16):
        raise LaunchError(f"{name}: rows must be whole 16 bytes, aligned to them; got {columns} columns")
    if aligned and widest is not None and columns > widest:
        raise LaunchError(f"{name}: {columns} columns do not fit in shared memory, which takes {widest}")
    return len(rows), columns


def _alike(one: Tensor, other: Tensor) -> int:
    """Columns of two tensors of rows that have as many, and one dtype."""
    columns = _rows("rows", one)[1]
    if _rows("rows", other)[1] != columns or one.dtype != other.dtype:
        raise LaunchError(
            f"{tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype} are not rows of a kind"
        )
    return columns


def _caches(key_cache: Tensor, value_cache: Tensor) -> int:
    """How many times 16 bytes a token's heads have."""
    if key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype or key_cache.ndim != 4:
        raise LaunchError(f"caches must be alike, [P, S, N, D]; got {tuple(key_cache.shape)}")
    size = key_cache.shape[2] * key_cache.shape[3] * key_cache.element_size()
    if size % 16 or not size or not key_cache.is_contiguous() or not value_cache.is_contiguous():
        raise LaunchError(f"a token's heads must be whole 16 bytes without gaps, got {size}")
    return size // 16


def _element(name: str, rows: Tensor) -> str:
    element = ELEMENTS.get(rows.dtype)
    if element not in cuda_table.FLOATS:
        raise LaunchError(f"{name} must be float32, float16 or bfloat16, got {rows.dtype}")
    return element


def _a_warp_each(kernel: str, rows: int) -> tuple[int, ...]:
    return (-(-rows * 32 // cuda_table.BY_NAME[kernel].threads),)


def _a_thread_each(kernel: str, items: int) -> tuple[int, ...]:
    return (-(-items // cuda_table.BY_NAME[kernel].threads),)


def _bounds(cu_seqlens: Tensor) -> int:
    """How many sequences there are."""
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or not cu_seqlens.is_contiguous():
        raise LaunchError(f"cumulative lengths must be [B+1], got {tuple(cu_seqlens.shape)}")
    return len(cu_seqlens) - 1


def _flat(count: int, **named: Tensor) -> None:
    for name, values in named.items():
        if values.shape != (count,) or not values.is_contiguous():
            raise LaunchError(f"{name} must be [{count}], got {tuple(values.shape)}")


def _outputs(count: int, columns: int, output: Output, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and scales to be written."""
    pitch = -(-columns // 8) if output == "binary" else columns
    rows = torch.empty((count, pitch), dtype=OUTPUTS[output], device=device)
    return rows, torch.empty(count, dtype=torch.float32, device=device)
