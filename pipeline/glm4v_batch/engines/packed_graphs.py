"""Steps of the packed engine as CUDA graphs: what the host would launch kernel by kernel starts at once."""

# R rows, T tokens of a step, N of them of prompts, S pieces, D hidden size

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm4v_batch.engines.generate import ran_out_of_memory
from glm4v_batch.engines.packed_attention import Packing, Sequences

# What a size needs that is made at its first run, as kernels are, cannot be made while CUDA records.
_RUNS_BEFORE = 1
# Each holds some megabytes of the device's memory.
_MOST_GRAPHS = 48


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computes with, on the device of the first layer.

    embeds     [T, D]
    positions  int64 [3, T]
    last       int64 [R], which token speaks for each row
    """

    embeds: Tensor
    positions: Tensor
    packing: Packing
    last: Tensor

    @property
    def size(self) -> "StepSize":
        """What all steps have in common that one graph serves."""
        return (self.packing.num_prompt, len(self.packing.pieces.key_counts), len(self.last))

    def tensors(self) -> list[Tensor]:
        """All of it, in an order of its own."""
        packing = self.packing
        sequences = [
            tensor
            for part in (packing.pieces, packing.rows)
            for tensor in (part.ends, part.key_starts, part.key_counts)
        ]
        return [self.embeds, self.positions, packing.writes, self.last, *sequences]

    def with_tensors(self, tensors: list[Tensor]) -> "Step":
        """The same step, of other tensors in that order."""
        embeds, positions, writes, last, *sequences = tensors
        longest = (self.packing.pieces.longest, self.packing.rows.longest)
        pieces, rows = (
            Sequences(ends, starts, counts, most)
            for (ends, starts, counts), most in zip((sequences[:3], sequences[3:]), longest, strict=True)
        )
        return Step(embeds, positions, Packing(writes, self.packing.num_prompt, pieces, rows), last)


StepSize = tuple[int, int, int]


class StepGraphs:
    """Runs steps through *run*, which gives int64 [R]; sizes that come often as graphs.

    All graphs read one set of buffers and work in one pool of memory: they run one after another.
    """

    def __init__(self, run: Callable[[Step], Tensor]) -> None:
        self._run = run
        self._runs: dict[StepSize, int] = {}
        self._graphs: OrderedDict[StepSize, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()
        self._buffers: list[Tensor] = []
        self._pool: Any = None
        self._stream: Any = None
        self._may_capture = True

    def run(self, step: Step) -> Tensor:
        """What *run* gives for *step*. It is overwritten by the next call. Raises torch.OutOfMemoryError."""
        step = self._in_buffers(step)
        size = step.size
        if size not in self._graphs and not self._captured(step):
            return self._run(step)
        self._graphs.move_to_end(size)
        graph, tokens = self._graphs[size]
        graph.replay()
        return tokens

    def forget(self) -> None:
        """Drop all graphs: what they were made of has changed."""
        if self._graphs:
            torch.cuda.synchronize()
        self._graphs.clear()
        self._runs.clear()

    def _captured(self, step: Step) -> bool:
        """Whether there is a graph for *step* now."""
        runs = self._runs.get(step.size, 0)
        self._runs[step.size] = runs + 1
        if runs < _RUNS_BEFORE or not self._may_capture:
            return False
        if len(self._graphs) == _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            self._graphs[step.size] = self._capture(step)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            # Without graphs the same memory serves steps and images.
            self._may_capture = False
            self.forget()
        return step.size in self._graphs

    def _capture(self, step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if not self._graphs:
            # A pool of memory ends with the last graph that works in it.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # One stream for all: each has a workspace of its own for products of matrices.
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with _recording(graph, self._pool, self._stream):
            tokens = self._run(step)
        return graph, tokens

    def _in_buffers(self, step: Step) -> Step:
        """*step* where graphs look for it."""
        given = step.tensors()
        if not self._buffers or any(t.numel() > b.numel() for t, b in zip(given, self._buffers, strict=True)):
            self.forget()
            self._buffers = [self._buffer_for(place, tensor) for place, tensor in enumerate(given)]
        views = [b[: t.numel()].view(t.shape).copy_(t) for t, b in zip(given, self._buffers, strict=True)]
        return step.with_tensors(views)

    def _buffer_for(self, place: int, tensor: Tensor) -> Tensor:
        held = self._buffers[place].numel() if self._buffers else 0
        # Rather too large once than too small again, which costs all graphs.
        return tensor.new_zeros(max(held, 2 * tensor.numel()))


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """As `torch.cuda.graph`, which also collects garbage and empties the cache: half a second each time."""
    torch.cuda.synchronize()
    was_collecting = gc.isenabled()
    # What is collected now might free memory of the device, which CUDA does not record.
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            # Other threads pin memory meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if was_collecting:
            gc.enable()
