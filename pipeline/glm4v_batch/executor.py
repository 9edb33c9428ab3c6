"""Run a job in this process: lock the output, load the model, pull the pipe, stop when asked to."""

import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from glm4v_batch.activations import can_predict
from glm4v_batch.devices import DeviceMonitor, DeviceUse
from glm4v_batch.engines import Engine, EngineEvent
from glm4v_batch.engines.echo import EchoSettings, load_echo
from glm4v_batch.engines.loading import ReplicaSettings, load_engine
from glm4v_batch.forecast import packed_demand
from glm4v_batch.output import Output, describe, locked, offload_folder
from glm4v_batch.parts import Part
from glm4v_batch.placement import priors
from glm4v_batch.plan import OpenJob, Plan, make_plan, preprocess_settings
from glm4v_batch.preprocess import preprocess
from glm4v_batch.replicas import Replicas
from glm4v_batch.report import Report
from glm4v_batch.types import BatchRun, Chunk, Completion, Failure, ReplicaLost, ReplicaReady
from glm4v_batch.worker import work

_LOOK_SECONDS = 1.0
# Less than what service managers wait between asking and killing: 30 s and more.
_GRACE_SECONDS = 25.0


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


@dataclass(frozen=True, slots=True)
class DevicesSeen:
    """What the run's GPUs are doing, once a second."""

    uses: tuple[DeviceUse, ...]


Event = Plan | Part | DevicesSeen | EngineEvent | Outcome


def run(opened: OpenJob, limit: int | None = None) -> Generator[Event, None, None]:
    """Do what is left of the job: yield the plan, what happens as it happens, and the outcome last.

    Raises what `locked` and `make_plan` raise; what is committed by then stays.
    """
    folder = Path(opened.job.output.path)
    with locked(folder):
        plan = make_plan(opened, limit)
        yield plan
        num_failed = sum(part.info.num_failed for part in plan.parts)
        report = _report(plan)
        chunks = plan.chunks()
        first = next(chunks, None)
        if first is None:
            yield Outcome(plan, report.as_dict(), num_failed, None)
            return
        describe(folder, opened.job.as_dict(), opened.settings)
        with _stop_on_signals() as stop:
            yield from _counted(_watched(plan, _events(plan, _until(stop, first, chunks), stop)), report)
        report.write()
        # A signal that came when nothing was left to stop interrupted nothing.
        complete = report.num_committed == plan.num_left
        number = stop.signal_number if stop.is_heeded and not complete else None
        yield Outcome(plan, report.as_dict(), num_failed + report.num_failed_committed, number)


def _report(plan: Plan) -> Report:
    folder = Path(plan.opened.job.output.path)
    if plan.forecast is None:
        num_replicas = max(1, plan.opened.job.batching.echo_replicas)
        return Report(folder, ("echo",) * num_replicas)
    return Report(folder, plan.forecast.contexts, plan.forecast.time)


def _events(plan: Plan, chunks: Iterable[Chunk], stop: "_Stop") -> Iterator[Part | EngineEvent]:
    opened = plan.opened
    output = Output(Path(opened.job.output.path), opened.settings, opened.passed_fields)
    settings = preprocess_settings(opened)
    engine = open_engine(plan)
    drained_at = None
    with closing(
        work(plan, chunks, partial(preprocess, settings=settings, num_workers=num_decoders()), engine, output)
    ) as events:
        for event in events:
            yield event
            # The batches in hand are worth waiting for: their answers may complete a chunk.
            if stop.heed() and drained_at is None:
                engine.drain()
                drained_at = time.monotonic()
            if drained_at is not None and time.monotonic() - drained_at > _GRACE_SECONDS:
                return


def num_decoders() -> int:
    """Worker processes for preprocessing: the cores that this process may use, one left for itself."""
    # Only Linux tells which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores - 1)


def _watched(plan: Plan, events: Iterable[Part | EngineEvent]) -> Iterator[Part | EngineEvent | DevicesSeen]:
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
    return Replicas(load_engine, replica_settings(plan), plan.num_left)


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
            packed=packed_demand(job, forecast, replica) if forecast.is_packed else None,
        )
        for index, replica in enumerate(forecast.placement.replicas)
    ]


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
