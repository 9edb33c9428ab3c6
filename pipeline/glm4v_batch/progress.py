"""Show a run as it goes: a bar on a terminal, a line every half minute elsewhere."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from glm4v_batch.devices import DeviceUse
from glm4v_batch.durable import Way
from glm4v_batch.errors import printable
from glm4v_batch.executor import DevicesSeen, Event, Outcome
from glm4v_batch.forecast import Forecast
from glm4v_batch.parts import Part
from glm4v_batch.plan import Plan
from glm4v_batch.render import changed_lines, time_as_text
from glm4v_batch.types import BatchRun, Completion, Failure, Notice, ReplicaLost, ReplicaReady
from glm4v_batch.units import GIB, format_bytes, format_count, format_seconds

_LOG_SECONDS = 30.0
_WAYS: dict[Way, str] = {
    "renameat2": "no hard links on this file system; parts get their names by a rename that replaces nothing",
    "rename": "neither hard links nor exclusive renames on this file system; parts get their names by a "
    "plain rename, which only the lock keeps exclusive",
}


class Progress:
    """Writes to *stream* what happens, and knows how far the run is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._started = self._last_line = time.monotonic()
        self._num_done = 0
        self._num_failed = 0
        self._num_left: int | None = None
        self._forecast: Forecast | None = None
        self._devices = ""
        self._ways_said: set[Way] = {"link"}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def follow(self, events: Iterable[Event]) -> Outcome:
        """Show *events* and return the outcome, which is the last of them."""
        for event in events:
            match event:
                case Plan():
                    self._begin(event)
                case Completion() | Failure():
                    self._count(event)
                case BatchRun() if event.out_of_memory:
                    self._note(f"out of memory: a batch of {event.shape.batch_size} was split")
                case ReplicaReady() | ReplicaLost():
                    self._note(f"{self._name(event.replica)} {_what_became(event)}")
                case DevicesSeen():
                    self._show_devices(event.uses)
                case Part():
                    self._say_way(event)
                case Notice():
                    self._note(event.message)
                case Outcome():
                    return event
        raise AssertionError("a run ends with its outcome")

    def _begin(self, plan: Plan) -> None:
        for line in _plan_lines(plan):
            self._note(line)
        self._num_left = plan.num_left
        self._forecast = plan.forecast
        if self._stream.isatty() and plan.num_left != 0:
            self._bar = tqdm(total=plan.num_left, unit=" rows", file=self._stream, smoothing=0.1)

    def _say_way(self, part: Part) -> None:
        if part.way not in self._ways_said:
            self._ways_said.add(part.way)
            self._note(f"{part.path.parent}: {_WAYS[part.way]}")

    def _count(self, result: Completion | Failure) -> None:
        self._num_done += 1
        self._num_failed += isinstance(result, Failure)
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update()
            if isinstance(result, Failure):
                self._show_postfix()
        elif time.monotonic() - self._last_line > _LOG_SECONDS:
            self._last_line = time.monotonic()
            self._note(self._progress_line())

    def _progress_line(self) -> str:
        rate = self._num_done / (self._last_line - self._started)
        total = "" if self._num_left is None else f" of {self._num_left:,}"
        devices = f"; {self._devices}" if self._devices else ""
        return f"{self._num_done:,}{total} rows, {self._num_failed:,} failed, {rate:.1f} rows/s{devices}"

    def _show_devices(self, uses: Sequence[DeviceUse]) -> None:
        self._devices = ", ".join(map(_use, uses))
        self._show_postfix()

    def _show_postfix(self) -> None:
        if self._bar is not None:
            failed = f"{self._num_failed:,} failed" if self._num_failed else ""
            with suppress(OSError):
                self._bar.set_postfix_str(", ".join(filter(None, [failed, self._devices])))

    def _name(self, replica: int) -> str:
        if self._forecast is None:
            return f"replica {replica}"
        devices = self._forecast.placement.replicas[replica].devices
        return f"replica {replica} on {', '.join(device.label for device in devices)}"

    def _note(self, line: str) -> None:
        # Whoever read the progress may be gone, or the terminal closed; the work goes on.
        with suppress(OSError):
            if self._bar is not None:
                self._bar.write(printable(line), file=self._stream)
            else:
                self._stream.write(f"{printable(line)}\n")
                self._stream.flush()


def _what_became(event: ReplicaReady | ReplicaLost) -> str:
    if isinstance(event, ReplicaReady):
        held = f" with {format_bytes(sum(event.held_bytes))}" if event.held_bytes else ""
        return f"ready after {format_seconds(event.seconds)}{held}"
    end = "given up" if event.is_final else "lost"
    return f"{end}, {format_count(event.num_requests, 'request')} to do again: {event.reason}"


def _use(use: DeviceUse) -> str:
    """One GPU's memory in GiB, and how busy it is."""
    busy = "" if use.utilisation is None else f" {use.utilisation:.0%}"
    return f"GPU {use.index} {use.used_bytes / GIB:.1f}/{use.total_bytes / GIB:.0f} GiB{busy}"


def _plan_lines(plan: Plan) -> Iterator[str]:
    job = plan.opened.job
    left = "an unknown number of rows" if plan.num_left is None else format_count(plan.num_left, "row")
    again = "" if plan.retries is None else " that failed"
    yield f"{job.name}: {left}{again} to do, {plan.num_committed:,} committed in {job.output.path}"
    if plan.forecast is not None:
        yield f"model {job.model.name}: {plan.forecast.placement.reason}"
        if plan.forecast.time is not None:
            yield f"expected: {time_as_text(plan.forecast.time)}"
    elif plan.num_left != 0:
        yield "echo engine: no model is loaded"
    for line in changed_lines(plan):
        yield f"changed: {line}"
    for path in plan.vanished:
        yield f"gone: {path}; its parts stay"
