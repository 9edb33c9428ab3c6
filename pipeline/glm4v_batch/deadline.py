"""A time to be done by: how long what is begun will take yet, by the pace so far."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

from glm4v_batch.errors import JobError

# The pace is an average: what is in hand may be slower than what came before.
_ALLOWANCE = 1.25
_COMMIT_SECONDS = 1.0


def read_deadline(text: str, now: datetime | None = None) -> datetime:
    """The moment that *text* names: `06:00` is the next time that clocks here show it.

    A date and a time, as `2026-11-23T06:00`, is taken as it stands, in local time unless it names
    its offset. Raises JobError for anything else.
    """
    now = datetime.now().astimezone() if now is None else now
    try:
        if len(text) <= len("06:00:00"):
            return _next(datetime.strptime(text, "%H:%M:%S" if text.count(":") == 2 else "%H:%M"), now)
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        raise JobError(
            f"--until {text} is no time.", hint="Write 06:00, or a date with it: 2026-11-23T06:00."
        ) from None


def _next(clock: datetime, now: datetime) -> datetime:
    # Without an offset until the last step: the clocks may be changed in the night between.
    local = now.replace(tzinfo=None)
    today = local.replace(hour=clock.hour, minute=clock.minute, second=clock.second, microsecond=0)
    found = today.astimezone()
    return found if found > now else (today + timedelta(days=1)).astimezone()


def resume_command(arguments: Sequence[str], until: datetime | None) -> str:
    """The command that goes on with what `glm4v-batch` was started for by *arguments*.

    *until* is the moment that its `--until` meant, None where that counts no more. Once it has passed,
    the option is left out: it would end the run at once, or mean tomorrow.

    >>> resume_command(["run", "a job.yaml", "--until", "06:00", "--limit", "5"], None)
    "glm4v-batch run 'a job.yaml' --limit 5"
    """
    counts = until is not None and not Deadline(until).has_passed
    return shlex.join(["glm4v-batch", *(arguments if counts else _without_until(arguments))])


def _without_until(arguments: Sequence[str]) -> Iterator[str]:
    rest = iter(arguments)
    for argument in rest:
        if argument == "--until":
            next(rest, None)
        elif not argument.startswith("--until="):
            yield argument


class Deadline:
    """Says whether another chunk can still be done by *at*. *clock* gives seconds since 1970."""

    def __init__(self, at: datetime, clock: Callable[[], float] = time.time) -> None:
        self.at = at
        self._clock = clock
        self._began: float | None = None
        self._num_admitted = 0
        self._num_ended = 0

    @property
    def has_passed(self) -> bool:
        """Whether it is that late."""
        return self.seconds_left <= 0

    @property
    def seconds_left(self) -> float:
        """The time until then; below 0 when it has passed."""
        return self.at.timestamp() - self._clock()

    def begin(self) -> None:
        """Take the pace from here, if not from earlier: loading a model is no measure of it."""
        if self._began is None:
            self._began = self._clock()

    def end_one(self) -> None:
        """Count a record as done."""
        self._num_ended += 1

    def admit(self, num_rows: int) -> bool:
        """Whether *num_rows* more can be done in time, with all that is in hand; they are in hand then.

        Before anything is measured there is no saying, and only the time itself refuses.
        """
        if self._seconds_for(num_rows) >= self.seconds_left:
            return False
        self._num_admitted += num_rows
        return True

    def _seconds_for(self, num_rows: int) -> float:
        if self._began is None or not self._num_ended:
            return 0.0
        seconds_each = (self._clock() - self._began) / self._num_ended
        num_in_hand = self._num_admitted + num_rows - self._num_ended
        return num_in_hand * seconds_each * _ALLOWANCE + _COMMIT_SECONDS
