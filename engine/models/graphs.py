"""GraphedBackbone: small batches as CUDA graphs, one launch where a forward pass makes hundreds.

A graph repeats what was recorded: the same kernels, for the same shapes, on the same memory. So a batch is laid into
buffers that stay where they are and brought to the size of a bucket, by a sequence of its own that nobody looks at:

    cu_seqlens    0 0 … 0 | 0 … T | size           empty sequences, the batch's own, what fills it up

What follows the lengths on the host (`runs`, a text at a time) is recorded as for one long sequence, and is wrong for
every other batch: graphs serve only if they say the same as the model does without them. The longest sequence is only a
bound, and is recorded as the size of the bucket.

Batches run one after the other in one thread on one stream, and what is done to buffers is done in that order. A second
batch under way overwrites them behind the first one's forward pass; the result is copied out of them at once, since
results may be read from another stream.

Nothing here has run on a device: tests repeat what was recorded on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from carpool.engine.errors import first_line
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.difference import apart
from carpool.engine.models.stretching import StretchingBackbone
from carpool.engine.packing import PackedBatch, pack_ids

# Relative: what rounding may make of products of more rows. The wrong neighbours make it 0.1 and more.
_MAY_DIFFER = 1e-3
_MAY_DIFFER_16_BIT = 3e-2


class Bucket(NamedTuple):
    """The most that a batch recorded at this size may have."""

    tokens: int
    sequences: int


# Beyond the last the device has work for longer than the host takes to launch it.
BUCKETS = (Bucket(64, 8), Bucket(128, 16), Bucket(256, 32), Bucket(512, 64))

Replay = Callable[[], None]


class Recorder(Protocol):
    """What makes graphs; on a device `CudaRecorder`, a stand-in in tests."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """What repeats the work, and the tensor that each repetition writes its result to."""
        ...


class CudaRecorder:
    """Records on one device. All its graphs share memory, which they may: no two run at once, nothing is left there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Raises RuntimeError if the work makes the host wait for the device: no graph can do that."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            try:
                with torch.cuda.stream(self._stream):
                    work()  # kernels are compiled and loaded, libraries get their working memory: not to be recorded
                    _without_waiting(work)
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    out = work()
            finally:
                torch.cuda.set_stream(before)  # a recording that fails leaves its own
                before.wait_stream(self._stream)
        return graph.replay, out


def _without_waiting(work: Callable[[], object]) -> None:
    """Asked before anything is recorded: a recording that is broken off leaves torch's memory in disorder."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class GraphedBackbone(Backbone):
    """`inner`, with a graph for every bucket. What fits none, rides on adapters or is kept, `inner` runs itself."""

    def __init__(
        self,
        inner: Backbone,
        recorder: Callable[[torch.device], Recorder] = CudaRecorder,
        buckets: tuple[Bucket, ...] = BUCKETS,
    ) -> None:
        """`buckets` from the smallest to the largest."""
        super().__init__(inner.module)
        self.packing = inner.packing
        self._inner, self._recorder, self._buckets = inner, recorder, buckets
        device = next(inner.module.parameters()).device
        size = buckets[-1]
        # What fills a batch up stands on place 0, which every table has: RoBERTa gives a place to all but pad tokens.
        self._filler = self._pad_id or 0
        with torch.inference_mode(False):  # else they could be written to in inference mode only
            self._ids = torch.full((size.tokens,), self._filler, device=device)
            self._places, self._types = torch.zeros(2, size.tokens, dtype=torch.int64, device=device)
            self._cu_seqlens = torch.zeros(size.sequences + 2, dtype=torch.int32, device=device)
        record = recorder(device).record
        # The largest first: the others find its memory.
        with torch.inference_mode():
            self._graphs = {bucket: record(self._work(bucket)) for bucket in reversed(buckets)}

    def _work(self, bucket: Bucket) -> Callable[[], Tensor]:
        """The forward pass over the buffers; laid out for a batch of no sequences until another is."""
        tokens, sequences = bucket
        batch = PackedBatch(
            input_ids=self._ids[:tokens],
            position_ids=self._places[:tokens],
            cu_seqlens=self._cu_seqlens[: sequences + 2],
            bounds=(0, tokens),
            runs=((tokens, 1),),
            token_type_ids=self._types[:tokens],
        )

        def work() -> Tensor:
            return self._inner.forward(batch)

        self._cu_seqlens.zero_()
        self._cu_seqlens[sequences + 1] = tokens
        return work

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """[T, H] in the model's dtype, as `Backbone.forward`."""
        bucket = self._bucket(batch)
        if bucket is None:
            return self._inner.forward(batch)
        self._lay(batch, bucket)
        replay, out = self._graphs[bucket]
        replay()
        return out[: batch.num_tokens].clone()

    def _bucket(self, batch: PackedBatch) -> Bucket | None:
        """The smallest that holds the batch."""
        if batch.adapters or batch.unseen or batch.kept is not None:
            return None
        tokens, sequences = batch.num_tokens, len(batch.cu_seqlens) - 1
        return next(
            (size for size in self._buckets if tokens <= size.tokens and sequences <= size.sequences), None
        )

    def _lay(self, batch: PackedBatch, bucket: Bucket) -> None:
        """Put the batch into the buffers: on the device, without the host waiting for it."""
        tokens, ends = batch.num_tokens, len(batch.cu_seqlens)
        for buffer, given, filler in (
            (self._ids, batch.input_ids, self._filler),
            (self._places, batch.position_ids, 0),
            (self._types, batch.token_type_ids, 0),
        ):
            if given is None:
                buffer[:tokens].zero_()
            else:
                buffer[:tokens].copy_(given)
            buffer[tokens : bucket.tokens].fill_(filler)
        # Empty sequences stand in front, where a token follows: RoBERTa looks at the one that a sequence begins with.
        first = bucket.sequences + 2 - ends - (tokens < bucket.tokens)
        self._cu_seqlens[:first].zero_()
        self._cu_seqlens[first : first + ends].copy_(batch.cu_seqlens)
        self._cu_seqlens[first + ends : bucket.sequences + 2].fill_(bucket.tokens)

    def replica(self) -> GraphedBackbone:
        return GraphedBackbone(self._inner.replica(), self._recorder, self._buckets)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedBackbone:
        """For another device, perhaps: a graph belongs to where it was recorded, so the copy records its own."""
        return GraphedBackbone(copy.deepcopy(self._inner, memo), self._recorder, self._buckets)


def graphed(
    inner: Backbone,
    *,
    vocab_size: int,
    max_model_len: int,
    recorder: Callable[[torch.device], Recorder] = CudaRecorder,
    buckets: tuple[Bucket, ...] = BUCKETS,
) -> tuple[Backbone, str | None]:
    """The backbone with its small batches recorded; or as it was, and a notice that says why."""
    fault = _unfit(inner)
    if fault is None:
        try:
            backbone = GraphedBackbone(inner, recorder, buckets)
            fault = _fault(backbone, inner, vocab_size, max_model_len, buckets)
            if fault is None:
                return backbone, None
        except Exception as error:  # whatever cannot be recorded
            fault = first_line(error).rstrip(".")
    return inner, f"{type(inner.module).__name__} runs without CUDA graphs, which were asked for: {fault}."


def _unfit(inner: Backbone) -> str | None:
    """What is known without trying, as the end of a sentence."""
    if inner.packing == "padded":
        return "its texts are padded, which takes other shapes with every batch"
    if isinstance(inner, StretchingBackbone):
        return "its rotary frequencies follow the longest text of a batch"
    return None


@torch.inference_mode()
def _fault(
    backbone: Backbone, inner: Backbone, vocab_size: int, max_model_len: int, buckets: tuple[Bucket, ...]
) -> str | None:
    """What is wrong with the graphs, as the end of a sentence: each is asked about batches of different lengths."""
    device = next(inner.module.parameters()).device
    generator = torch.Generator().manual_seed(7)
    low = min(5, vocab_size - 1)
    whole = all(weight.dtype == torch.float32 for weight in inner.module.parameters())
    for tokens, sequences in buckets:
        cuts = torch.randperm(tokens - 4, generator=generator)[: sequences - 1].add(1).sort().values.tolist()
        many = [end - start for start, end in pairwise((0, *cuts, tokens - 3))]
        # Again at the end: what a batch leaves behind is nothing to the next.
        for lengths in (many, [tokens], many):
            batch = pack_ids(
                [
                    torch.randint(low, vocab_size, (min(n, max_model_len),), generator=generator).tolist()
                    for n in lengths
                ],
                device,
            )
            expected = inner.forward(batch)
            off = apart(backbone.forward(batch), expected)
            if not off <= (_MAY_DIFFER if whole else _MAY_DIFFER_16_BIT):
                return f"played back, its results differ (relative difference {off:.1e})"
    return None
