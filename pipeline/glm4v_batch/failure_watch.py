"""Notice when records fail because something broke, not because of what they are."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from glm4v_batch.job import LimitSettings
from glm4v_batch.types import Failure, Result

# So many, all failed, tell as much as a full window with a few.
_NUM_FIRST = 100


@dataclass(frozen=True, slots=True)
class TooManyFailed:
    """*num_failed* of the last *num_records* records failed; *codes* says how, the commonest first."""

    num_failed: int
    num_records: int
    codes: Mapping[str, int]


class FailureWatch:
    """Looks at the last records of a run.

    It fires when the window is full and too many in it failed, or when all of the first hundred did:
    a small input with a few bad records is no sign of anything.
    """

    def __init__(self, limits: LimitSettings) -> None:
        self._fraction = limits.failed_fraction
        self._window: deque[str | None] = deque(maxlen=limits.failed_window)
        self._codes: Counter[str] = Counter()
        self._num_seen = 0

    def add(self, result: Result) -> TooManyFailed | None:
        """Count *result*; what is wrong, once too many failed."""
        if self._fraction is None:
            return None
        if len(self._window) == self._window.maxlen and (oldest := self._window[0]) is not None:
            self._codes[oldest] -= 1
        code = result.code if isinstance(result, Failure) else None
        self._window.append(code)
        self._num_seen += 1
        if code is not None:
            self._codes[code] += 1
        return self._verdict()

    def _verdict(self) -> TooManyFailed | None:
        num, num_failed = len(self._window), self._codes.total()
        assert self._fraction is not None
        is_full = num == self._window.maxlen and num_failed > self._fraction * num
        is_total = self._num_seen == _NUM_FIRST and num_failed == num
        if not (is_full or is_total):
            return None
        return TooManyFailed(num_failed, num, {code: n for code, n in self._codes.most_common() if n})
