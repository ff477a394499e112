"""Every operation of `kernels.cuda_ops`: called with chosen arguments, its results compared with float64.

The float64 side is written here anew, sequence by sequence, and shares no code with kernels/reference/.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carpool.kernels import cuda_ops, reference
from emu.choose import Choose, bounds, lengths, normal

# Half a unit in the last place, relative; float32 adds up what the sums before it lost.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def near(got: Tensor, exact: Tensor, rounding: float) -> None:
    """Each within its rounding, or a millionth of the row's largest; NaN is never near."""
    assert got.shape == exact.shape, (got.shape, exact.shape)
    if not got.numel():
        return
    room = rounding * exact.abs() + 1e-6 * exact.abs().amax(-1, keepdim=True) + 1e-7
    wrong = ~((got.double() - exact).abs() <= room)
    assert not wrong.any(), f"{int(wrong.sum())} wrong: {got[wrong][:3]} for {exact[wrong][:3]}"


def finished(
    got: Tensor, scales: Tensor, exact: Tensor, widths: Tensor, unit: Tensor, output: reference.Output
) -> None:
    """Rows that were cut, normalised and cast; `exact` float64 [R, H] before that."""
    want = torch.zeros_like(exact)
    for i, width in enumerate(widths.tolist()):
        want[i, :width] = exact[i, :width]
        if unit[i]:
            want[i] /= want[i].norm().clamp_min(1e-12)
    assert got.dtype == reference.OUTPUTS[output]
    most = want.abs().amax(1, keepdim=True)
    if output == "int8":
        near(scales[:, None], most / 127, 2e-6)
        assert (got.double().abs().amax(1) == torch.where(most[:, 0] > 0, 127.0, 0.0)).all()
        # A half is either side's.
        assert ((got.double() * scales.double()[:, None] - want).abs() <= 0.501 * most / 127 + 1e-12).all()
        return
    assert (scales == 1).all()
    if output == "binary":
        shifts = torch.arange(7, -1, -1)
        bits = (got[:, :, None].long() >> shifts & 1).flatten(1).bool()
        columns = torch.arange(bits.shape[1])[None, :]
        padded = torch.nn.functional.pad(want, (0, bits.shape[1] - want.shape[1]))
        expected = (padded >= 0) & (columns < widths[:, None])
        sure = (padded.abs() > 1e-5 * most) | (columns >= widths[:, None]) | (most == 0)
        assert (bits == expected)[sure].all()
        return
    near(got.float(), want, ROUNDING[got.dtype])


def pool_rows(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    columns = choose.whole(1, 24) * (16 // dtype.itemsize)
    runs = lengths(choose, choose.one((3, 40, 150)))
    count = len(runs)
    modes = torch.tensor([choose.one((reference.CLS, reference.LAST, reference.MEAN)) for _ in runs]).to(
        torch.int8
    )
    widths = torch.tensor([choose.one((columns, choose.whole(0, columns))) for _ in runs], dtype=torch.int32)
    unit = torch.tensor([choose.one((True, False)) for _ in runs])
    hidden = (3 * normal(choose, sum(runs), columns) + 0.5).to(dtype)
    output = choose.one(choose.outputs)
    # Above that many tokens means are taken in two passes; to say so of shorter ones does no harm.
    longest = choose.one((None, max(runs), cuda_ops.LONG + 1))
    rows, scales = cuda_ops.pool_rows(hidden, bounds(runs), modes, widths, unit, output, longest)

    exact = torch.zeros(count, columns, dtype=torch.float64)
    for i, part in enumerate(torch.split(hidden.double(), runs)):
        if len(part):
            chosen = {reference.CLS: part[0], reference.LAST: part[-1], reference.MEAN: part.mean(0)}
            exact[i] = chosen[int(modes[i])]
    finished(rows, scales, exact, widths, unit, output)


def gather_rows(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    columns = choose.whole(1, 150)  # rows need not be whole vectors
    tokens = choose.whole(1, 40)
    hidden = normal(choose, tokens, columns, dtype=dtype)
    rows = choose.one(
        (None, torch.tensor([choose.whole(0, tokens - 1) for _ in range(choose.whole(0, 9))]).int())
    )
    chosen = hidden.double() if rows is None else hidden.double()[rows.long()]
    widths = torch.tensor(
        [choose.one((columns, choose.whole(0, columns))) for _ in chosen], dtype=torch.int32
    )
    unit = torch.tensor([choose.one((True, False)) for _ in chosen], dtype=torch.bool)
    output = choose.one(choose.outputs)
    got, scales = cuda_ops.gather_rows(hidden, rows, widths, unit, output)
    finished(got, scales, chosen, widths, unit, output)


def step_rows(choose: Choose) -> None:
    runs = lengths(choose, 70)
    ids = (4 * normal(choose, sum(runs)).abs()).long() % choose.whole(1, 4)
    tag = choose.one((0, 1 << 40))
    rows, starts = cuda_ops.step_rows(ids, bounds(runs), tag)

    assert rows.tolist() == [i for i, token in enumerate(ids.tolist()) if token == tag]
    counts = [part.eq(tag).sum().item() for part in torch.split(ids, runs)]
    assert starts.diff().tolist() == counts


def activate_rows(choose: Choose) -> None:
    rows, columns = choose.whole(1, 9), choose.whole(1, 100)
    logits = (choose.one((1, 30)) * normal(choose, rows, columns)).to(choose.one(choose.dtypes))
    kinds = (reference.IDENTITY, reference.SIGMOID, reference.SOFTMAX)
    chosen = torch.tensor([choose.one(kinds) for _ in range(rows)]).to(torch.int8)
    mean, sigma = choose.one(((0.0, 1.0), (0.25, 2.0)))
    got = cuda_ops.activate_rows(logits, chosen, mean, sigma)

    plain = (logits.double() - mean) / sigma
    for row, kind, exact in zip(got, chosen.tolist(), plain, strict=True):
        # The exponent's own rounding, of a number of up to a hundred, comes out as that of the result.
        near(row, (exact, exact.sigmoid(), exact.softmax(0))[kind], 2e-5)


def sparse_rows(choose: Choose) -> None:
    runs = lengths(choose, 12)
    columns = choose.whole(1, 300)
    logits = (3 * normal(choose, sum(runs), columns)).to(choose.one(choose.dtypes))
    sums, twice = choose.one((False, True)), choose.one((False, True))
    got = cuda_ops.sparse_rows(logits, bounds(runs), sums=sums, twice=twice)

    exact = torch.zeros(len(runs), columns, dtype=torch.float64)
    for i, part in enumerate(torch.split(logits.double(), runs)):
        weights = part.relu().log1p()
        weights = weights.log1p() if twice else weights
        if len(part):
            exact[i] = weights.sum(0) if sums else weights.amax(0)
    near(got, exact, 4e-6)


def cosine_pairs(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    columns = choose.whole(1, 40) * (16 // dtype.itemsize)
    a, b = normal(choose, 7, columns, dtype=dtype), normal(choose, 5, columns, dtype=dtype)
    a[0] = 0  # a row of no length has cosine 0 with all
    pairs = [(choose.whole(0, 6), choose.whole(0, 4)) for _ in range(choose.whole(0, 11))]
    in_a = torch.tensor([one for one, _ in pairs], dtype=torch.int32)
    in_b = torch.tensor([other for _, other in pairs], dtype=torch.int32)
    got = cuda_ops.cosine_pairs(a, b, in_a, in_b)

    one, other = a.double()[in_a.long()], b.double()[in_b.long()]
    exact = (one * other).sum(1) / one.norm(dim=1).clamp_min(1e-8) / other.norm(dim=1).clamp_min(1e-8)
    assert ((got.double() - exact).abs() <= 2e-6).all()


def maxsim(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    columns = choose.whole(1, 12) * (16 // dtype.itemsize)
    of_query, of_document = lengths(choose, 40, 3), lengths(choose, choose.one((5, 140)), 4)
    queries = normal(choose, sum(of_query), columns, dtype=dtype)
    documents = normal(choose, sum(of_document), columns, dtype=dtype)
    pairs = [(choose.whole(0, len(of_query) - 1), choose.whole(0, len(of_document) - 1)) for _ in range(3)]
    in_queries = torch.tensor([q for q, _ in pairs], dtype=torch.int32)
    in_documents = torch.tensor([d for _, d in pairs], dtype=torch.int32)
    got = cuda_ops.maxsim(queries, bounds(of_query), documents, bounds(of_document), in_queries, in_documents)

    for score, (q, d) in zip(got.tolist(), pairs, strict=True):
        query, document = (
            torch.split(queries.double(), of_query)[q],
            torch.split(documents.double(), of_document)[d],
        )
        products = query @ document.T
        exact = products.amax(1).sum().item() if products.numel() else 0.0
        room = 1e-6 * (query.norm(dim=1).sum() * (document.norm(dim=1).amax() if len(document) else 0)).item()
        assert abs(score - exact) <= room + 1e-7, (score, exact)


def norm_rows(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    rows, columns = choose.whole(1, 5), choose.whole(1, 300) * (16 // dtype.itemsize)
    x = (normal(choose, rows, columns) + choose.one((0, 1))).to(dtype)
    residual = choose.one((None, normal(choose, rows, columns, dtype=dtype)))
    weight, bias = normal(choose, columns), choose.one((None, normal(choose, columns)))
    centred, eps = choose.one((True, False)), choose.one((1e-12, 1e-5))
    keep = choose.one((True, False))
    got, total = cuda_ops.norm_rows(x, residual, weight, bias, eps, centred=centred, keep_sum=keep)

    # Exactly the sum in its own type: what is normalised is what the next layer adds to.
    kept = x if residual is None else (x.float() + residual.float()).to(dtype)
    assert torch.equal(total, kept) if keep and total is not None else total is None and not keep
    wide = kept.double()
    wide = wide - wide.mean(1, keepdim=True) if centred else wide
    exact = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight.double()
    near(got, exact if bias is None else exact + bias.double(), 2 * ROUNDING[dtype])


def rotary(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    tokens, heads = choose.whole(1, 9), choose.whole(1, 5)
    half, rest, before = choose.whole(1, 20), choose.whole(0, 9), choose.whole(0, 2)
    size = 2 * half + rest
    # A view of a fused row, as a model hands it over.
    x = normal(choose, tokens, heads + before + 1, size, dtype=dtype)[:, before : before + heads]
    angles = 50 * normal(choose, tokens, half).repeat(1, 2)
    tables = choose.one((torch.float32, dtype))
    cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    got = cuda_ops.rotary(x, cos, sin)

    assert torch.equal(got[..., 2 * half :], x[..., 2 * half :])
    left, right = x[..., : 2 * half].double().chunk(2, -1)
    one, other = (table.double()[:, None, :half] for table in (cos, sin))
    exact = torch.cat((left * one - right * other, right * one + left * other), -1)
    room = ROUNDING[dtype] * exact.abs() + 1e-6 * x.abs().amax().double()
    assert ((got[..., : 2 * half].double() - exact).abs() <= room).all()


def gated(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    rows, columns = choose.whole(1, 9), choose.whole(1, 40) * (16 // dtype.itemsize)
    both = (3 * normal(choose, rows, 2 * columns)).to(dtype)
    activations: tuple[reference.Activation, ...] = ("silu", "gelu", "gelu_tanh")
    activation, gate_first = choose.one(activations), choose.one((True, False))
    got = cuda_ops.gated(both, activation, gate_first=gate_first)

    gate, up = both.double().chunk(2, 1) if gate_first else reversed(both.double().chunk(2, 1))
    if activation == "silu":
        exact = gate * gate.sigmoid() * up
    else:
        approximate = "none" if activation == "gelu" else "tanh"
        exact = torch.nn.functional.gelu(gate, approximate=approximate) * up
    # Where a GELU is all but 0, 1 + erf has lost its digits to the 1: of the gate's size, not of the result's.
    room = (ROUNDING[dtype] + 4e-6) * exact.abs() + 4e-7 * (gate * up).abs() + 1e-7
    assert ((got.double() - exact).abs() <= room).all()


def paged(choose: Choose) -> None:
    """Written token by token to shuffled pages, then gathered as they were."""
    dtype = choose.one(choose.dtypes)
    heads, size = choose.whole(1, 3), choose.whole(1, 3) * (16 // dtype.itemsize)
    page_size = choose.one((1, 4, 16))
    runs = lengths(choose, 30)
    needed = [-(-run // page_size) for run in runs]
    total = sum(needed) + choose.whole(1, 3)
    generator = torch.Generator().manual_seed(choose.whole(0, 999))
    order = torch.randperm(total, generator=generator).int()
    pages = torch.full((len(runs), max(*needed, 1)), -1, dtype=torch.int32)
    slots = []
    for i, (run, mine) in enumerate(
        zip(runs, torch.split(order, [*needed, total - sum(needed)])[:-1], strict=True)
    ):
        pages[i, : len(mine)] = mine
        slots += [int(mine[t // page_size]) * page_size + t % page_size for t in range(run)]
    keys, values = (normal(choose, sum(runs), heads, size, dtype=dtype) for _ in range(2))
    caches = [torch.full((total, page_size, heads, size), -7.0, dtype=dtype) for _ in range(2)]
    # Some are to go nowhere.
    nowhere = [i for i in range(len(slots)) if choose.whole(0, 9) == 0][:3]
    given = torch.tensor(slots, dtype=torch.int64)
    given[nowhere] = torch.tensor([-1, total * page_size, -5])[: len(nowhere)]
    cuda_ops.kv_write(keys, values, given, caches[0], caches[1])

    for packed, cache in zip((keys, values), caches, strict=True):
        exact = torch.full((total * page_size, heads, size), -7.0, dtype=dtype)
        for i, slot in enumerate(slots):
            if i not in nowhere:
                exact[slot] = packed[i]
        assert torch.equal(cache.view(exact.shape), exact)
    got = cuda_ops.kv_gather(caches[0], caches[1], pages, bounds(runs), sum(runs))
    for back, packed in zip(got, (keys, values), strict=True):
        exact = packed.clone()
        exact[nowhere] = -7.0
        assert torch.equal(back, exact)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [L, N, D], key and value [K, N_kv, D], bool visible [L, K], added [N, L, K] → float64 [L, N, D]."""
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().T * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if added is not None:
            scores = scores + added[head]
        weights = scores.exp() * visible
        total = weights.sum(1) + (0 if sinks is None else sinks[head].double().exp())
        some = visible.any(1)
        out[some, head] = (weights @ value[:, head // group].double() / total[:, None])[some]
    return out


def near_mean(got: Tensor, exact: Tensor, value: Tensor) -> None:
    """Each within its rounding, or a few millionths of the largest value: weights have errors of their own."""
    assert got.dtype == value.dtype
    room = ROUNDING[got.dtype] * exact.abs() + 4e-6 * (value.abs().amax().double() if value.numel() else 0)
    wrong = ~((got.double() - exact).abs() <= room)
    assert not wrong.any(), f"{int(wrong.sum())} wrong: {got[wrong][:3]} for {exact[wrong][:3]}"


def head_size(choose: Choose, dtype: torch.dtype) -> int:
    """Mostly small: what is looked at byte by byte takes its time. Each width that is compiled for comes up."""
    vector = 16 // dtype.itemsize
    return vector * choose.whole(1, choose.one((16, 16, 64, 128, 256)) // vector)


def packed_attention(choose: Choose) -> None:
    dtype = choose.one(choose.dtypes)
    size, kv_heads, group = head_size(choose, dtype), choose.whole(1, 2), choose.one((1, 1, 2))
    runs = lengths(choose, choose.one((5, 20, 20, 140 if size <= 64 else 70)), count=3)
    heads, tokens = kv_heads * group, sum(runs)
    # Views of a fused row, as a model hands them over; the query's heads may stand apart.
    fused = normal(choose, tokens, 2 * heads + 2 * kv_heads, size, dtype=dtype)
    query, key, value = torch.split(fused, [2 * heads, kv_heads, kv_heads], 1)
    query = query[:, ::2] if choose.one((True, False)) else query[:, :heads]
    causal, window = choose.one((True, False)), choose.one((None, choose.whole(1, 9), choose.whole(1, 70)))
    softcap = choose.one((None, 2.0))
    longest, scale = max(runs) + choose.whole(0, 3), choose.one((size**-0.5, 0.5 * size**-0.5))
    bias = choose.one((None, normal(choose, heads, 2 * max(longest, 1) - 1)))
    sinks = choose.one((None, normal(choose, heads)))
    seen = choose.one((None, torch.tensor([choose.whole(0, run + 1) for run in runs], dtype=torch.int32)))
    got = cuda_ops.packed_attention(
        query, key, value, bounds(runs), longest,
        scale=scale, causal=causal, window=window, softcap=softcap, bias=bias, sinks=sinks, seen=seen,
    )  # fmt: skip

    parts = []
    for i, (q, k, v) in enumerate(zip(*(torch.split(x, runs) for x in (query, key, value)), strict=True)):
        place = torch.arange(len(q))
        behind = place[None, :] - place[:, None]  # how far the key stands behind its query
        visible = (behind <= 0) | (not causal)
        if window is not None:
            visible &= behind.abs() < window
        if seen is not None:
            visible &= place[None, :] < seen[i]
        added = None if bias is None else bias.double()[:, bias.shape[1] // 2 + behind]
        parts.append(attended(q, k, v, visible, scale=scale, softcap=softcap, added=added, sinks=sinks))
    near_mean(got, torch.cat(parts), value)


def paged_attention(choose: Choose) -> None:
    """The last tokens of each sequence, whose keys and values lie in shuffled pages."""
    dtype = choose.one(choose.dtypes)
    size, kv_heads, group = head_size(choose, dtype), choose.whole(1, 2), choose.one((1, 1, 2))
    page_size = choose.one((1, 3, 16))
    runs = lengths(choose, choose.one((1, 5, 20, 70)), count=3)
    have = [run + choose.whole(0, choose.one((0, 20, 90))) for run in runs]
    needed = [-(-length // page_size) for length in have]
    total = sum(needed) + choose.whole(1, 3)
    generator = torch.Generator().manual_seed(choose.whole(0, 999))
    order = torch.randperm(total, generator=generator).int()
    pages = torch.full((len(runs), max(*needed, 1)), -1, dtype=torch.int32)
    for own, mine in zip(pages, torch.split(order, [*needed, total - sum(needed)])[:-1], strict=True):
        own[: len(mine)] = mine
    caches = [normal(choose, total, page_size, kv_heads, size, dtype=dtype) for _ in range(2)]
    # What nobody has written yet may be anything, and has no part.
    written = torch.zeros(total * page_size, dtype=torch.bool)
    slots = [own.long()[(t := torch.arange(length)) // page_size] * page_size + t % page_size
             for own, length in zip(pages, have, strict=True)]  # fmt: skip
    written[torch.cat(slots)] = True
    for cache in caches:
        cache.view(total * page_size, kv_heads, size)[~written] = float("nan")
    query = normal(choose, sum(runs), kv_heads * group, size, dtype=dtype)
    window, softcap = choose.one((None, choose.whole(1, 9), choose.whole(1, 70))), choose.one((None, 2.0))
    sinks, scale = choose.one((None, normal(choose, kv_heads * group))), size**-0.5
    got = cuda_ops.paged_attention(
        query, caches[0], caches[1], pages, bounds(runs), torch.tensor(have, dtype=torch.int32), max(runs),
        scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip

    parts = []
    for q, length, slot in zip(torch.split(query, runs), have, slots, strict=True):
        key, value = (cache.view(total * page_size, kv_heads, size)[slot] for cache in caches)
        behind = torch.arange(length)[None, :] - torch.arange(length - len(q), length)[:, None]
        visible = (behind <= 0) & (behind > -(window or length + 1))
        parts.append(attended(q, key, value, visible, scale=scale, softcap=softcap, sinks=sinks))
    near_mean(got, torch.cat(parts), caches[1].nan_to_num(0))


CASES: dict[str, Callable[[Choose], None]] = {
    case.__name__: case
    for case in (
        pool_rows,
        gather_rows,
        step_rows,
        activate_rows,
        sparse_rows,
        cosine_pairs,
        maxsim,
        norm_rows,
        rotary,
        gated,
        paged,
        packed_attention,
        paged_attention,
    )
}
