"""How long a device is at each phase of its work, without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from glm4v_batch.types import Phase

Moment = float | torch.cuda.Event


class Stopwatch:
    """Times work on *device*; a GPU is asked later how long it took.

    Where the host is too slow to keep a GPU at work within a stretch, the gaps count as work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stretches: deque[tuple[Mapping[Phase, float], Moment, Moment]] = deque()

    @contextmanager
    def time(self, shares: Mapping[Phase, float]) -> Iterator[None]:
        """Time what is launched inside; of its seconds each phase gets its share."""
        begin = self._now()
        try:
            yield
        finally:
            self._stretches.append((shares, begin, self._now()))

    def ended(self) -> Iterator[tuple[Phase, float]]:
        """Phases and seconds of what has ended since the last call."""
        while self._stretches and _is_over(self._stretches[0][2]):
            shares, begin, end = self._stretches.popleft()
            for phase, share in shares.items():
                yield phase, share * _seconds(begin, end)

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
