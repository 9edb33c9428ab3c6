"""How long a device is at work, without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


class Stopwatch:
    """Times work on *device*, each stretch under a name; a GPU is asked later how long it took.

    Where the host is too slow to keep a GPU at work within a stretch, the gaps count as work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stretches: deque[tuple[str, Moment, Moment]] = deque()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time what is launched inside."""
        begin = self._now()
        try:
            yield
        finally:
            self._stretches.append((name, begin, self._now()))

    def ended(self) -> Iterator[tuple[str, float]]:
        """The stretches that have ended since the last call, and their seconds."""
        while self._stretches and _is_over(self._stretches[0][2]):
            name, begin, end = self._stretches.popleft()
            yield name, _seconds(begin, end)

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _is_over(moment: Moment) -> bool:
    return isinstance(moment, float) or bool(moment.query())  # type: ignore[no-untyped-call]


def _seconds(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    return float(begin.elapsed_time(end)) / 1000  # type: ignore
