"""Work of the packed engine as CUDA graphs: what the host would launch kernel by kernel starts at once."""

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from glm4v_batch.engines.generate import ran_out_of_memory

_log = logging.getLogger(__name__)

RUNS_TO_RECORD = 2
"""A size is recorded at its second run: what the first one makes, as kernels, CUDA does not record."""

# Each holds some megabytes of the device's memory.
_MOST_GRAPHS = 48
# Graphs recorded in an unlucky order take more memory than the same ones recorded anew.
_MOST_FAILURES = 3


class Recordable(Protocol):
    """What a graph computes with."""

    @property
    def size(self) -> Hashable:
        """What everything has in common that one graph serves."""
        ...

    def tensors(self) -> list[Tensor]:
        """All of its tensors, in an order of its own."""
        ...

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same, of other tensors in that order."""
        ...


_Given = TypeVar("_Given", bound=Recordable)


class Graphs(Generic[_Given]):
    """Gives what work on the device gives, a tensor there; sizes that come again as graphs.

    All graphs read one set of buffers and work in one pool of memory: they run one after another. *kind*
    says of what they are.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._runs: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, tuple[Any, Tensor]] = OrderedDict()
        self._buffers: list[Tensor] = []
        self._pool: Any = None
        self._num_failures = 0

    def run(self, do: Callable[[_Given], Tensor], given: _Given) -> Tensor:
        """What *do* gives for *given*, until the next call overwrites it. Raises torch.OutOfMemoryError.

        *do* is always the same. It is not kept: whoever has the graphs could not go before them.
        """
        given = self._in_buffers(given)
        if given.size not in self._graphs and not self._captured(do, given):
            return do(given)
        self._graphs.move_to_end(given.size)
        graph, found = self._graphs[given.size]
        graph.replay()
        return found

    def forget(self) -> None:
        """Drop all graphs: what they were made of has changed."""
        if self._graphs:
            torch.cuda.synchronize()
        self._graphs.clear()
        self._runs.clear()

    def _captured(self, do: Callable[[_Given], Tensor], given: _Given) -> bool:
        """Whether there is a graph for *given* now."""
        runs = self._runs.get(given.size, 0)
        self._runs[given.size] = runs + 1
        if runs + 1 < RUNS_TO_RECORD or self._num_failures == _MOST_FAILURES:
            return False
        if len(self._graphs) == _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            self._graphs[given.size] = self._capture(do, given)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            self._make_do_without()
        return given.size in self._graphs

    def _make_do_without(self) -> None:
        """Drop all graphs, as memory ran out for one: what they hold serves images and steps alike."""
        self._num_failures += 1
        is_last = self._num_failures == _MOST_FAILURES
        _log.warning(
            "Recording a CUDA graph of %s ran out of memory (%d of %d times): %s A lower "
            "devices.memory_fraction leaves room.",
            self._kind,
            self._num_failures,
            _MOST_FAILURES,
            "from now on the host launches kernel by kernel, which is slower." if is_last
            else "all of them are recorded anew.",
        )  # fmt: skip
        self.forget()

    def _capture(self, do: Callable[[_Given], Tensor], given: _Given) -> tuple[Any, Tensor]:
        if not self._graphs:
            # A pool of memory ends with the last graph that works in it.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with _recording(graph, self._pool, _stream_for(self._kind)):
            found = do(given)
        return graph, found

    def _in_buffers(self, given: _Given) -> _Given:
        """*given* where graphs look for it."""
        tensors = given.tensors()
        if not self._buffers or any(
            t.numel() > b.numel() for t, b in zip(tensors, self._buffers, strict=True)
        ):
            self.forget()
            self._buffers = [self._buffer_for(place, tensor) for place, tensor in enumerate(tensors)]
        pairs = zip(tensors, self._buffers, strict=True)
        return given.with_tensors([b[: t.numel()].view(t.shape).copy_(t) for t, b in pairs])

    def _buffer_for(self, place: int, tensor: Tensor) -> Tensor:
        held = self._buffers[place].numel() if self._buffers else 0
        # Rather too large once than too small again, which costs all graphs.
        return tensor.new_zeros(max(held, 2 * tensor.numel()))


@cache
def _stream_for(kind: str) -> torch.cuda.Stream:  # noqa: ARG001  what it is cached by
    """Where all graphs of a kind are recorded, and none of another.

    Each stream has a workspace of its own for products of matrices, which newer versions of torch let go
    of when a graph that was recorded there ends.
    """
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """As `torch.cuda.graph`, which also collects garbage each time: half a second."""
    torch.cuda.synchronize()
    # While CUDA records, nothing of the cache can be given up for what is needed.
    torch.cuda.empty_cache()
    was_collecting = gc.isenabled()
    # What is collected now might free memory of the device, which CUDA does not record.
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            # Other threads pin memory meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                # That a recording which ended early cannot be ended well is no news.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if was_collecting:
            gc.enable()
