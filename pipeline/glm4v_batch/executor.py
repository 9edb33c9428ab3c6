"""Run a job in this process: lock the output, load the model, pull the pipe, stop when asked to."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from glm4v_batch.engines import Engine
from glm4v_batch.output import Output, describe, locked
from glm4v_batch.parts import Part
from glm4v_batch.plan import OpenJob, Plan, make_plan, preprocess_settings
from glm4v_batch.preprocess import preprocess
from glm4v_batch.report import Report, read_samples
from glm4v_batch.types import BatchRun, Chunk, Completion, Failure
from glm4v_batch.worker import work


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. *signal_number* is None unless a signal stopped it."""

    plan: Plan
    report: dict[str, Any]
    num_failed: int
    signal_number: int | None

    @property
    def exit_code(self) -> int:
        """0, 3 with failed records in the folder, 128 and the number of the signal that ended the run."""
        if self.signal_number is not None:
            return 128 + self.signal_number
        return 3 if self.num_failed else 0


Event = Plan | Part | Completion | Failure | BatchRun | Outcome


def run(opened: OpenJob, limit: int | None = None) -> Iterator[Event]:
    """Do what is left of the job: yield the plan, what happens as it happens, and the outcome last.

    Raises what `locked` and `make_plan` raise; what is committed by then stays.
    """
    folder = Path(opened.job.output.path)
    with locked(folder):
        plan = make_plan(opened, limit)
        yield plan
        num_failed = sum(part.info.num_failed for part in plan.parts)
        report = Report(folder, _context(plan))
        chunks = plan.chunks()
        first = next(chunks, None)
        if first is None:
            yield Outcome(plan, report.as_dict(), num_failed, None)
            return
        describe(folder, opened.job.as_dict(), opened.settings)
        with _stop_on_signals() as stop:
            yield from _counted(_events(plan, _until(stop, first, chunks), stop), report)
        report.write()
        # A signal that came when nothing was left to stop interrupted nothing.
        complete = report.num_committed == plan.num_left
        number = stop.signal_number if stop.is_heeded and not complete else None
        yield Outcome(plan, report.as_dict(), num_failed + report.num_failed_committed, number)


def _events(plan: Plan, chunks: Iterable[Chunk], stop: "_Stop") -> Iterator[Event]:
    opened = plan.opened
    output = Output(Path(opened.job.output.path), opened.settings, opened.passed_fields)
    settings = preprocess_settings(opened)
    engine = open_engine(plan)
    if stop.heed():  # it came while the model loaded
        return
    with closing(
        work(plan, chunks, partial(preprocess, settings=settings, num_workers=num_decoders()), engine, output)
    ) as events:
        for event in events:
            yield event
            # Not before: the batch's other answers are there already and may complete a chunk.
            if isinstance(event, BatchRun) and stop.heed():
                return


def num_decoders() -> int:
    """Worker processes for preprocessing: the cores that this process may use, one left for itself."""
    # Only Linux tells which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores - 1)


def _counted(events: Iterable[Event], report: Report) -> Iterator[Event]:
    for event in events:
        match event:
            case Completion() | Failure():
                report.add_result(event)
            case BatchRun():
                report.add_batch(event)
            case Part():
                report.add_part(event)
        yield event


def _context(plan: Plan) -> str:
    if plan.placement is None:
        return "echo"
    devices = ", ".join(f"{d.torch_name} {d.name}" for r in plan.placement.replicas for d in r.devices)
    settings = plan.opened.settings
    return f"{settings['model.config']} {settings['model.dtype']} on {devices}"


def open_engine(plan: Plan) -> Engine:
    """The engine that the job names, loaded."""
    batching = plan.opened.job.batching
    if batching.engine == "echo":
        from glm4v_batch.engines.echo import EchoEngine

        return EchoEngine(batching.max_batch_size or 64, batching.echo_seconds)
    return _generate_engine(plan)


def _generate_engine(plan: Plan) -> Engine:
    from glm4v_batch.engines.generate import GenerateEngine, vocabulary_of
    from glm4v_batch.memory import MemoryModel, prior_coefficients
    from glm4v_batch.meters import meter_for
    from glm4v_batch.model import load_model

    assert plan.placement is not None
    opened, (replica,) = plan.opened, plan.placement.replicas
    job, checkpoint = opened.job, opened.checkpoint
    model = load_model(checkpoint.folder, job.model.dtype, replica.device_map)
    meter = meter_for(replica.devices[0])
    memory = MemoryModel(
        meter.held_bytes(),
        prior_coefficients(model.config.to_dict(), model.dtype.itemsize),
        read_samples(Path(job.output.path), _context(plan)),
    )
    return GenerateEngine(
        model,
        vocabulary_of(checkpoint, preprocess_settings(opened).renderer().decode),
        job.generation,
        memory,
        meter,
        memory_fraction=job.devices.memory_fraction,
        max_batch_size=job.batching.max_batch_size,
    )


class _Stop:
    """Whether a signal asked the run to stop, which, and whether something was left to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.is_heeded = False

    def heed(self) -> bool:
        """Whether the run is to end here."""
        self.is_heeded = self.is_heeded or self.signal_number is not None
        return self.is_heeded

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        # The second signal is not ours any more: it ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        self.signal_number = number
        # Straight to the descriptor: the stream may be in the middle of a write of its own.
        with suppress(OSError):
            os.write(2, b"\nStopping after the batch in hand; once more to stop at once.\n")


@contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals; a program that embeds us has its own
        return
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # nohup and job runners ignore a signal on purpose; so it stays.
    previous = {n: signal.signal(n, stop) for n in asked if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _until(stop: _Stop, first: Chunk, rest: Iterable[Chunk]) -> Iterator[Chunk]:
    yield first
    for chunk in rest:
        if stop.heed():
            return
        yield chunk
