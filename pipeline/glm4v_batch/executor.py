"""Drive a run: plan it, start what works, pull the pipe, and stop when asked to."""

import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, assert_never

from glm4v_batch.activations import can_predict
from glm4v_batch.asked import EVERYTHING, Asked
from glm4v_batch.changes import take_away
from glm4v_batch.deadline import Deadline
from glm4v_batch.devices import DeviceMonitor, DeviceUse
from glm4v_batch.engines import Engine, EngineEvent
from glm4v_batch.engines.echo import EchoSettings, load_echo
from glm4v_batch.engines.loading import ReplicaSettings, load_engine, with_run
from glm4v_batch.errors import Glm4vBatchError, OutputError, SourceError
from glm4v_batch.failure_watch import FailureWatch, TooManyFailed
from glm4v_batch.forecast import packed_demand
from glm4v_batch.output import Lock, Output, describe, locked, offload_folder
from glm4v_batch.parts import Part
from glm4v_batch.placement import priors
from glm4v_batch.plan import OpenJob, Plan, make_plan, preprocess_settings
from glm4v_batch.preprocess import preprocess
from glm4v_batch.replicas import Replicas
from glm4v_batch.report import Report, trim_runs
from glm4v_batch.retry import Replaced, Replacements, Retry, retried_records
from glm4v_batch.stopping import Interrupted, OutOfTime, Reason, Stop, stopping
from glm4v_batch.types import BatchRun, Chunk, Completion, Failure, Notice, ReplicaLost, ReplicaReady
from glm4v_batch.units import format_count
from glm4v_batch.worker import Collects, Item, new_records, work

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; *num_failed* counts the folder's failed rows. *reason* is None where all is done."""

    plan: Plan
    report: dict[str, Any]
    num_failed: int
    reason: Reason | None

    @property
    def is_late(self) -> bool:
        """Whether the time that it was to end by is what ended it."""
        return isinstance(self.reason, OutOfTime)

    @property
    def exit_code(self) -> int:
        """0, or 3 with failed records in the folder; 129, 130, 143 to be resumed; 4 where too many failed."""
        match self.reason:
            case Interrupted():
                return 128 + self.reason.signal_number
            case OutOfTime():
                return 128 + signal.SIGTERM
            case TooManyFailed():
                return SourceError.exit_code
            case None:
                return 3 if self.num_failed else 0
        assert_never(self.reason)


@dataclass(frozen=True, slots=True)
class DevicesSeen:
    """What the run's GPUs are doing, once a second."""

    uses: tuple[DeviceUse, ...]


Event = Plan | Part | Replaced | DevicesSeen | EngineEvent | Notice | Outcome


def run(
    opened: OpenJob, asked: Asked = EVERYTHING, until: datetime | None = None
) -> Generator[Event, None, None]:
    """Do what is left of the job: yield the plan, what happens as it happens, and the outcome last.

    It begins nothing that cannot be done by *until*. Raises what `locked` and `make_plan` raise;
    what is committed by then stays. A program calls this, and `open_job`, below `if __name__ ==
    "__main__":`, because the processes that it starts import the program's main module.
    """
    with locked(Path(opened.job.output.path)) as lock:
        yield from run_locked(lock, opened, asked, until)


def run_locked(
    lock: Lock, opened: OpenJob, asked: Asked = EVERYTHING, until: datetime | None = None
) -> Generator[Event, None, None]:
    """As `run`, for who holds the output folder already by *lock*."""
    trim_runs(lock.folder)
    plan = make_plan(opened, asked)
    yield plan
    report = _report(plan)
    deadline = None if until is None else Deadline(until)
    tasks: Iterator[Any] = _tasks(plan)
    first = next(tasks, None)
    if first is None or (deadline is not None and deadline.has_passed):
        reason = None if first is None or until is None else OutOfTime(until)
        if reason is None:
            if plan.parts:
                describe(lock.folder, opened.job.as_dict(), opened.settings)
            take_away(lock, plan.superseded)
        yield _outcome(plan, report, reason)
        return
    with stopping(deadline) as stop, _reporting(lock, plan, report):
        describe(lock.folder, opened.job.as_dict(), opened.settings)
        take_away(lock, plan.superseded)
        admitted = stop.admit(chain([first], tasks))
        yield from _counted(_watched(plan, _events(plan, lock, admitted, stop)), report)
    if report.trouble:
        yield Notice(f"the report of this run is incomplete: {report.trouble}")
    # What came when nothing was left to stop has stopped nothing.
    yield _outcome(plan, report, None if report.num_committed == plan.num_left else stop.reason)


def _tasks(plan: Plan) -> Iterator[Chunk] | Iterator[Retry]:
    return plan.chunks() if plan.retries is None else iter(plan.retries.of)


@contextmanager
def _reporting(lock: Lock, plan: Plan, report: Report) -> Iterator[None]:
    """Leave the *report* of what is done inside, however that ends; an error of ours says how far it came."""
    try:
        yield
    except Glm4vBatchError as error:
        error.progress = _progress(plan, report)
        raise
    finally:
        _leave_report(lock, report)


def _leave_report(lock: Lock, report: Report) -> None:
    try:
        lock.check()
    except OutputError as error:  # the folder may be another run's by now
        report.trouble = report.trouble or str(error)
    else:
        report.write()


def _progress(plan: Plan, report: Report) -> str:
    folder = plan.opened.job.output.path
    if plan.retries is not None:
        again = format_count(plan.retries.num_rows, "failed row")
        return f"{report.num_committed:,} of {again} in {folder} were done again by then."
    total = plan.num_committed + report.num_committed
    of_all = "rows" if plan.num_rows is None else f"of {format_count(plan.num_rows, 'row')}"
    return f"{total:,} {of_all} were committed in {folder} by then."


def _outcome(plan: Plan, report: Report, reason: Reason | None) -> Outcome:
    num_failed = sum(part.info.num_failed for part in plan.parts) + report.num_failed_committed
    return Outcome(plan, report.as_dict(), num_failed, reason)


def _report(plan: Plan) -> Report:
    folder = Path(plan.opened.job.output.path)
    if plan.forecast is None:
        num_replicas = max(1, plan.opened.job.batching.echo_replicas)
        return Report(folder, ("echo",) * num_replicas)
    return Report(folder, plan.forecast.contexts, plan.forecast.time, plan.num_left)


def _events(
    plan: Plan, lock: Lock, tasks: Iterator[Any], stop: Stop
) -> Iterator[Part | Replaced | EngineEvent]:
    settings = preprocess_settings(plan.opened)
    engine = open_engine(plan)
    records, output = _ends(plan, lock, tasks)
    watch = FailureWatch(plan.opened.job.limits)
    prepare = partial(preprocess, settings=settings, num_workers=num_decoders())
    with closing(work(records, prepare, engine, output)) as events:
        for event in stop.pull(events):
            yield event
            stop.note(event)
            # Rows that failed before stay what they are, and cannot fail a whole data set.
            if plan.retries is None and isinstance(event, (Completion, Failure)):
                stop.reason = watch.add(event) or stop.reason
            if isinstance(stop.reason, TooManyFailed) or stop.is_over(engine):
                return


def _ends(plan: Plan, lock: Lock, tasks: Iterator[Any]) -> tuple[Iterator[Item], Collects]:
    """Where the records of a run come from, and where their results go."""
    if plan.retries is not None:
        replacements = Replacements(lock)
        return retried_records(plan.opened.source, tasks, replacements), replacements
    output = Output(lock, plan.opened.settings, plan.opened.passed_fields)
    return new_records(plan, tasks, output), output


def num_decoders() -> int:
    """Worker processes for preprocessing: the cores that this process may use, one left for itself."""
    # Only Linux tells which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores - 1)


def _watched(
    plan: Plan, events: Iterable[Part | Replaced | EngineEvent]
) -> Iterator[Part | Replaced | EngineEvent | DevicesSeen]:
    """*events*, and once a second what the devices do."""
    replicas = plan.forecast.placement.replicas if plan.forecast else ()
    last_look = time.monotonic()
    with closing(DeviceMonitor([device for replica in replicas for device in replica.devices])) as monitor:
        for event in events:
            yield event
            if time.monotonic() - last_look >= _LOOK_SECONDS:
                last_look = time.monotonic()
                yield DevicesSeen(monitor.read())


def _counted(events: Iterable[Event], report: Report) -> Iterator[Event]:
    for event in events:
        match event:
            case Completion() | Failure():
                report.add_result(event)
            case BatchRun():
                report.add_batch(event)
            case Part():
                report.add_part(event)
            case Replaced():
                report.add_replaced(event)
            case ReplicaReady() | ReplicaLost():
                report.add_replica(event)
            case DevicesSeen():
                report.add_uses(event.uses)
        yield event


def open_engine(plan: Plan) -> Engine:
    """The engine that the job names: in this process, or in one for each replica of the model."""
    batching = plan.opened.job.batching
    if batching.engine == "echo":
        settings = EchoSettings(batching.max_batch_size or 64, batching.echo_seconds)
        if batching.echo_replicas:
            return Replicas(load_echo, [settings] * batching.echo_replicas, plan.num_left)
        return load_echo(settings)
    return Replicas(load_engine, replica_settings(plan), plan.num_left, with_run)


def replica_settings(plan: Plan) -> list[ReplicaSettings]:
    """What the process of each replica is started with."""
    forecast, job = plan.forecast, plan.opened.job
    assert forecast is not None
    return [
        ReplicaSettings(
            job=job,
            checkpoint=plan.opened.checkpoint,
            replica=replica,
            priors=priors(replica, forecast.needs),
            samples=forecast.samples(index),
            must_probe=not can_predict(forecast.needs.config),
            offload_folder=offload_folder(Path(job.output.path), index),
            packed=packed_demand(job, forecast, replica) if forecast.is_packed(index) else None,
            num_expected=None if plan.num_left is None else plan.num_left // len(forecast.placement.replicas),
        )
        for index, replica in enumerate(forecast.placement.replicas)
    ]
