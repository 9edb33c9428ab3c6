"""Choose the next batch: similar lengths together, as many as the memory budget allows.

The oldest waiting request is always in the next batch, with the neighbours nearest to it in
length. So no request starves, chunks finish in about the order they came in, and a batch pads
little.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from glm4v_batch.memory import MemoryModel
from glm4v_batch.types import BatchShape, Request

_SMALLEST_POOL = 64
_LARGEST_POOL = 1024
# Requests of four batches to choose from pad about as little as more would.
_POOL_BATCHES = 4
_LARGEST_POOL_BYTES = 1 << 30


def batch_shape(requests: Sequence[Request]) -> BatchShape:
    """The features of the memory model for *requests* run as one padded batch."""
    return BatchShape.padded(
        len(requests),
        max(request.prompt_tokens for request in requests),
        sum(request.visual_patches for request in requests),
        max(request.max_new_tokens for request in requests),
    )


def _with_request(shape: BatchShape, request: Request) -> BatchShape:
    longest = shape.padded_tokens // shape.batch_size
    new_tokens = max(shape.kv_tokens // shape.batch_size - longest, request.max_new_tokens)
    return BatchShape.padded(
        shape.batch_size + 1,
        max(longest, request.prompt_tokens),
        shape.visual_patches + request.visual_patches,
        new_tokens,
    )


class Scheduler:
    """The requests that wait, and which of them run next."""

    def __init__(self, memory: MemoryModel, max_batch_size: int | None = None) -> None:
        self._memory = memory
        self._max_batch_size = max_batch_size or _LARGEST_POOL
        self._by_length: list[tuple[int, int, Request]] = []
        self._by_age: dict[int, Request] = {}
        self._arrivals = 0
        self._pool_bytes = 0
        self._last_size = 0

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def is_full(self) -> bool:
        """Whether enough requests wait to choose a well-matched batch from."""
        target = min(max(_SMALLEST_POOL, _POOL_BATCHES * self._last_size), _LARGEST_POOL)
        return len(self) >= target or self._pool_bytes >= _LARGEST_POOL_BYTES

    def add(self, request: Request) -> None:
        """Let *request* wait for its batch."""
        insort(self._by_length, (request.prompt_tokens, self._arrivals, request), key=lambda e: e[:2])
        self._by_age[self._arrivals] = request
        self._arrivals += 1
        self._pool_bytes += request.inputs.patches.nbytes

    def next_batch(self, budget_bytes: Sequence[int]) -> list[Request]:
        """Take the next batch out of the pool; it is never empty while requests wait.

        The oldest request comes even where it alone exceeds the budget: only trying shows.
        """
        low, high = self._widest_run(budget_bytes)
        taken = self._by_length[low:high]
        del self._by_length[low:high]
        for _, arrival, request in taken:
            del self._by_age[arrival]
            self._pool_bytes -= request.inputs.patches.nbytes
        self._last_size = len(taken)
        return [request for _, _, request in taken]

    def _widest_run(self, budget_bytes: Sequence[int]) -> tuple[int, int]:
        # Grow a run of the length-sorted pool around the oldest request, always on the side
        # whose next request is nearer to it in length, until nothing more fits.
        arrival, oldest = next(iter(self._by_age.items()))
        low = self._index(oldest.prompt_tokens, arrival)
        high = low + 1
        shape = batch_shape([oldest])
        while high - low < self._max_batch_size:
            side = self._nearer_side(low, high, oldest.prompt_tokens)
            if side is None:
                break
            shape = _with_request(shape, self._by_length[side][2])
            if not self._memory.fits(shape, budget_bytes):
                break
            low, high = min(low, side), max(high, side + 1)
        return low, high

    def _nearer_side(self, low: int, high: int, anchor_tokens: int) -> int | None:
        shorter = anchor_tokens - self._by_length[low - 1][0] if low > 0 else None
        longer = self._by_length[high][0] - anchor_tokens if high < len(self._by_length) else None
        if longer is None or (shorter is not None and shorter <= longer):
            return None if shorter is None else low - 1
        return high

    def _index(self, tokens: int, arrival: int) -> int:
        return bisect_left(self._by_length, (tokens, arrival), key=lambda entry: entry[:2])
