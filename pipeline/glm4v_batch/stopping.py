"""End a run before its work does: a signal, a deadline, or too many failures.

The first signal is a request: nothing more is begun, and the batches in hand are waited for. The second
is not ours any more.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import TypeVar

from glm4v_batch.deadline import Deadline
from glm4v_batch.engines import Engine
from glm4v_batch.failure_watch import TooManyFailed
from glm4v_batch.interruption import heeded, let_the_next_one_end_it
from glm4v_batch.retry import Retry
from glm4v_batch.types import BatchStart, Chunk, Completion, Failure

# Less than what service managers wait between asking and killing: 30 s and more.
_GRACE_SECONDS = 25.0
# The clock of a timer ends in some 290 years.
_LONGEST_TIMER_SECONDS = 100 * 365 * 86_400.0
# Nothing looks at the clock while the run waits for a decoder or the source: an alarm ends that.
_LATE_SECONDS = 1.0

_Task = TypeVar("_Task", Chunk, Retry)
_Event = TypeVar("_Event")


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A signal ended the run."""

    signal_number: int


@dataclass(frozen=True, slots=True)
class OutOfTime:
    """What was left could not be done by *deadline*."""

    deadline: datetime


Reason = Interrupted | OutOfTime | TooManyFailed
"""Why a run ended before its work did."""


class Stop:
    """Whether the run is to end before its work does, and why."""

    def __init__(self, deadline: Deadline | None) -> None:
        self.reason: Reason | None = None
        self.signal_number: int | None = None
        self._deadline = deadline
        self._drained_at: float | None = None
        self.is_pulling = False

    def pull(self, events: Iterator[_Event]) -> Iterator[_Event]:
        """*events*; it is known when the next one is being waited for."""
        while True:
            self.is_pulling = True
            try:
                event = next(events)
            except StopIteration:
                return
            finally:
                self.is_pulling = False
            yield event

    def admit(self, tasks: Iterable[_Task]) -> Iterator[_Task]:
        """*tasks*, as long as another may begin."""
        for task in tasks:
            if self.is_asked():
                return
            if self._deadline is not None and not self._deadline.admit(task.num_rows):
                self.reason = OutOfTime(self._deadline.at)
                return
            yield task

    def note(self, event: object) -> None:
        """Take the pace from *event*."""
        match event:
            case BatchStart() if self._deadline is not None:
                self._deadline.begin()
            case Completion() | Failure() if self._deadline is not None:
                self._deadline.end_one()

    def is_over(self, engine: Engine) -> bool:
        """Whether to wait no longer. The batches in hand are worth waiting for: their answers may
        complete a part.
        """
        if self._drained_at is None and self.is_asked():
            engine.drain()
            self._drained_at = time.monotonic()
        return self._drained_at is not None and time.monotonic() - self._drained_at > _GRACE_SECONDS

    def is_asked(self) -> bool:
        """Whether a signal or the deadline asks the run to end; `reason` tells which."""
        if self.signal_number is not None:
            self.reason = Interrupted(self.signal_number)
        elif self._deadline is not None and self._deadline.has_passed:
            self.reason = OutOfTime(self._deadline.at)
        else:
            return False
        return True


class _GraceOverError(BaseException):
    """The grace is over, and the run waits for something that does not come."""


@contextmanager
def stopping(deadline: Deadline | None) -> Iterator[Stop]:
    """Have signals stop what is done inside: the first one gently, the second one at once."""
    stop = Stop(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals; a program that embeds us has its own
        return

    def stop_gently(number: int, _frame: FrameType | None) -> None:
        let_the_next_one_end_it()
        stop.signal_number = number
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS + _LATE_SECONDS, _LATE_SECONDS)
        # Straight to the descriptor: the stream may be in the middle of a write of its own.
        with suppress(OSError):
            os.write(2, b"\nStopping after the batch in hand; once more to stop at once.\n")

    def end_the_grace(_number: int, _frame: FrameType | None) -> None:
        # Elsewhere, as in whoever shows the events, the time is looked at before the next one.
        if stop.is_pulling:
            raise _GraceOverError

    previous = {number: signal.signal(number, stop_gently) for number in heeded()}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, end_the_grace)
    if deadline is not None:
        left = min(max(0.0, deadline.seconds_left), _LONGEST_TIMER_SECONDS)
        late = left + _GRACE_SECONDS + _LATE_SECONDS
        signal.setitimer(signal.ITIMER_REAL, late, _LATE_SECONDS)
    try:
        yield stop
    except _GraceOverError:
        stop.is_asked()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
