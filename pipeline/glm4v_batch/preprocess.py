"""Prepare records in worker processes that may die.

Each worker has a thread of the driver and a pipe to itself, so a worker that crashes, hangs or eats
its memory takes nothing with it but the group of records it holds; these are then tried one by one.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from glm4v_batch import wire
from glm4v_batch.child import Child, End
from glm4v_batch.confinement import (
    allow_cpu,
    be_silent,
    forbid_files,
    forget_environment,
    leave_no_core,
    limit_memory,
)
from glm4v_batch.errors import Glm4vBatchError, PlacementError
from glm4v_batch.failure_codes import FailureCode
from glm4v_batch.images import heed_only_bombs
from glm4v_batch.prepare import (
    NO_MEMORY,
    Item,
    Prepare,
    Prepared,
    Preprocessor,
    PreprocessSettings,
    failure_of,
)
from glm4v_batch.types import Request

if TYPE_CHECKING:
    import pyarrow as pa

_START_SECONDS = 120
_READY = "ready"
_SLOW = "slow"
# Once may be a run that was stopped and continued meanwhile.
_MOST_SLOW = 2
_PORTION_SECONDS = 0.25
_DEATHS_ALONE = 2
_KILLS_ALONE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAhead:
    """How far preprocessing may run ahead of who takes its requests, and in what portions it works."""

    records: int = 512
    bytes: int = 256 * 1024**2
    records_per_group: int = 32
    bytes_per_group: int = 4 * 1024**2


MakePrepare = Callable[[PreprocessSettings], Prepare]


def preprocess(
    items: Iterable[Item],
    settings: PreprocessSettings,
    *,
    num_workers: int,
    ahead: LookAhead = LookAhead(),
    make: MakePrepare = Preprocessor,
) -> Generator[Prepared, None, None]:
    """One request or failure per item, in order, prepared by *num_workers* processes (0: by this one).

    *make* must be importable where the workers start. No worker outlives the generator,
    which is closed by whoever stops half-way.
    """
    if num_workers == 0:
        prepare = make(settings)
        yield from (prepare(chunk, record) for chunk, record in items)
        return
    with _Workers(num_workers, settings, make) as workers:
        yield from _Window(workers, ahead).run(items)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A group of records that a worker has or will have."""

    group: Sequence[Item]
    num_bytes: int
    answer: "Future[list[Prepared]]"


class _Window:
    """The groups between the source and who takes the requests: bounded by count and by bytes.

    How large a prepared record will be is not known before; the largest of late is the estimate.
    """

    def __init__(self, workers: "_Workers", ahead: LookAhead) -> None:
        self._workers = workers
        self._ahead = ahead
        self._pending: deque[_Pending] = deque()
        self._record_bytes = 1024.0**2

    def run(self, items: Iterable[Item]) -> Iterator[Prepared]:
        for group, num_bytes in self._groups(items):
            self._pending.append(_Pending(group, num_bytes, self._workers.submit(group)))
            while self._is_full() or (self._pending and self._pending[0].answer.done()):
                yield from self._take()
        while self._pending:
            yield from self._take()

    def _is_full(self) -> bool:
        records = sum(len(pending.group) for pending in self._pending)
        num_bytes = sum(pending.num_bytes for pending in self._pending)
        # One group is always let through, however large.
        too_much = records > self._ahead.records or num_bytes > self._ahead.bytes
        return len(self._pending) > 1 and too_much

    def _groups(self, items: Iterable[Item]) -> Iterator[tuple[list[Item], int]]:
        """*items* by groups, each with what it will take, as far as is known."""
        group: list[Item] = []
        num_bytes = 0.0
        for item in items:
            group.append(item)
            num_bytes += _item_bytes(item) + self._record_bytes
            if len(group) >= self._ahead.records_per_group or num_bytes >= self._ahead.bytes_per_group:
                yield group, round(num_bytes)
                group, num_bytes = [], 0.0
        if group:
            yield group, round(num_bytes)

    def _take(self) -> Iterator[Prepared]:
        pending = self._pending.popleft()
        results = self._workers.results(pending.group, pending.answer)
        largest = 0
        for result in results:
            largest = max(largest, _result_bytes(result))
            yield result
        self._record_bytes = max(float(largest), 0.8 * self._record_bytes)


class _WorkerLostError(Exception):
    """A worker died or took too long after it had made *done* of its group.

    Code and message are those of the record's failure, should it be guilty; *was_killed* speaks against
    that: what a record makes a decoder do ends it by other signals.
    """

    def __init__(
        self, code: FailureCode, message: str, done: Sequence[Prepared] = (), *, was_killed: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.done = done
        self.was_killed = was_killed


class _Workers:
    """Worker processes, each driven by one thread at a time."""

    def __init__(self, num_workers: int, settings: PreprocessSettings, make: MakePrepare) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="preprocess")
        self._workers = [_Worker(settings, make) for _ in range(num_workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()  # wakes the thread that waits for it
        self._threads.shutdown()

    def submit(self, group: Sequence[Item]) -> "Future[list[Prepared]]":
        return self._threads.submit(self._ask, group)

    def results(self, group: Sequence[Item], answer: "Future[list[Prepared]]") -> Iterator[Prepared]:
        """The results of *group*; those that a lost worker had not made are made one by one."""
        try:
            yield from answer.result()
            return
        except _WorkerLostError as error:
            done = error.done
        yield from done
        alone = [self._threads.submit(self._ask_alone, item) for item in group[len(done) :]]
        for single in alone:
            yield single.result()

    def _ask_alone(self, item: Item) -> Prepared:
        """The result of a record that has a worker to itself, or its failure where workers die over it.

        Not at its first death: the kernel may kill any process for want of memory, and people do.
        """
        num_deaths = num_kills = 0
        while True:
            try:
                return self._ask([item])[0]
            except _WorkerLostError as lost:
                num_kills += lost.was_killed
                num_deaths += not lost.was_killed
                if num_deaths == _DEATHS_ALONE or num_kills == _KILLS_ALONE:
                    return failure_of(item, "decode", lost.code, str(lost))

    def _ask(self, group: Sequence[Item]) -> list[Prepared]:
        worker = self._idle.get()
        try:
            return worker.ask(group)
        finally:
            self._idle.put(worker)


class _Worker:
    """One worker process and the pipe to it. It is started when asked, and again after a loss."""

    def __init__(self, settings: PreprocessSettings, make: MakePrepare) -> None:
        self._settings = settings
        self._make = make
        self._lock = threading.Lock()
        self._closed = False
        self._child: Child | None = None
        self._pipe: Connection | None = None

    def ask(self, group: Sequence[Item]) -> list[Prepared]:
        """What the worker makes of *group*. Raises _WorkerLostError if it dies or takes too long."""
        done: list[Prepared] = []
        pipe = self._pipe or self._start()
        try:
            wire.send(pipe, [(chunk, replace(record, passed=None)) for chunk, record in group])
            while len(done) < len(group) and pipe.poll(self._settings.record_seconds):
                answer = wire.receive(pipe)
                if isinstance(answer, Glm4vBatchError):
                    raise answer
                done += cast(list[Prepared], answer)
        except (EOFError, OSError) as error:
            raise self._lost(done) from error
        if len(done) < len(group):
            self._end(grace_seconds=0)
            raise _timeout(f"{self._settings.record_seconds:g} s", done)
        return done

    def _lost(self, done: Sequence[Prepared]) -> _WorkerLostError:
        end = self._end(grace_seconds=1)
        if end.code == -signal.SIGXCPU:
            return _timeout(f"{self._settings.record_cpu_seconds:g} s of work", done)
        message = f"the decoder died: {end}"
        return _WorkerLostError("decoder_crashed", message, done, was_killed=end.was_killed)

    def close(self) -> None:
        """Kill the process; a thread that waits for it gets a _WorkerLostError."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.kill()

    def _start(self) -> Connection:
        """The pipe to a new process; no record is to blame where others kill it before it has one."""
        num_slow = 0
        for _ in range(_KILLS_ALONE):
            answer = self._started()
            if answer == _READY and self._pipe is not None:
                return self._pipe
            end = self._end(grace_seconds=1)
            if isinstance(answer, Glm4vBatchError):
                raise answer
            num_slow += answer == _SLOW
            if num_slow == _MOST_SLOW:
                raise _too_slow()
            end.refuse_unguarded()
            if not end.was_killed:
                raise RuntimeError(f"a preprocessing worker did not start: {end}")
        raise PlacementError(
            f"A decoder was killed {_KILLS_ALONE} times while it started.",
            hint="The kernel does that where memory runs out, and tells by dmesg. Free memory, or let the "
            "run use fewer cores (taskset): it starts a decoder for each but one.",
        )

    def _started(self) -> object:
        """What a new process says first; None where it ends without a word, `_SLOW` where it takes long."""
        with self._lock:
            if self._closed:
                raise _WorkerLostError("decoder_crashed", "preprocessing was stopped")
            self._child = Child(_serve, self._settings, self._make, name="glm4v-decoder")
        self._pipe = self._child.pipe
        try:
            return self._pipe.recv() if self._pipe.poll(_START_SECONDS) else _SLOW
        except (EOFError, OSError):
            return None

    def _end(self, *, grace_seconds: float) -> End:
        """Make sure that the process is gone, and say how it ended."""
        assert self._child is not None
        self._pipe = None
        return self._child.end(grace_seconds=grace_seconds)


def _too_slow() -> PlacementError:
    return PlacementError(
        f"A decoder did not start within {_START_SECONDS:g} s, {_MOST_SLOW} times over.",
        hint="It reads the program and the model's tokenizer first: see whether the disks or the network "
        "that hold them are slow.",
    )


def _timeout(patience: str, done: Sequence[Prepared]) -> _WorkerLostError:
    return _WorkerLostError("decoder_timeout", f"the record was not prepared within {patience}", done)


def _serve(pipe: Connection, settings: PreprocessSettings, make: MakePrepare) -> None:
    """The worker: prepare groups until the driver closes the pipe."""
    forget_environment()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker starts a thread per core
    try:
        prepare = make(settings)
    except Glm4vBatchError as error:  # the user's mistake: the driver raises it
        pipe.send(error)
        return
    be_silent()
    heed_only_bombs()
    forbid_files()
    leave_no_core()
    limit_memory(settings.worker_memory_bytes)
    pipe.send(_READY)
    with suppress(EOFError, OSError):  # the driver is gone, or has closed the pipe
        while True:
            group: Sequence[Item] = wire.receive(pipe)
            for portion in _portions(prepare, group, settings.record_cpu_seconds):
                wire.send(pipe, portion)


def _portions(
    prepare: Prepare, group: Sequence[Item], cpu_seconds: float
) -> Iterator[list[Prepared] | Glm4vBatchError]:
    """What becomes of *group*, sent on a few times a second, so that the driver sees it go on."""
    done: list[Prepared] = []
    began = time.monotonic()
    for item in group:
        allow_cpu(cpu_seconds)
        try:
            done.append(_prepared(prepare, item))
        except Glm4vBatchError as error:  # the driver raises it
            yield error
            return
        if time.monotonic() - began > _PORTION_SECONDS:
            yield done
            done, began = [], time.monotonic()
    if done:
        yield done


def _prepared(prepare: Prepare, item: Item) -> Prepared:
    try:
        return prepare(*item)
    except MemoryError:
        return failure_of(item, "decode", "out_of_memory", NO_MEMORY)


def _item_bytes(item: Item) -> int:
    _, record = item
    images = sum(len(ref.data or b"") for ref in record.images)
    passed = () if record.passed is None else record.passed.itercolumns()
    return images + sum(map(_column_bytes, passed)) + sum(map(_field_bytes, record.fields.values()))


def _column_bytes(column: "pa.ChunkedArray") -> int:
    """What one row's *column* takes of its own: rows may share a dictionary, and views their buffers."""
    import pyarrow as pa  # decoders have no use for it, and would pay for it

    if pa.types.is_dictionary(column.type):
        return sum(chunk.indices.nbytes for chunk in column.chunks)
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    return int(column.nbytes)


def _field_bytes(value: object) -> int:
    """About what *value* takes where that may be much: text, and lists and structs of it."""
    match value:
        case str() | bytes():
            return len(value)
        case list():
            return sum(map(_field_bytes, value))
        case dict():
            return sum(map(_field_bytes, value.values()))
    return sys.getsizeof(value)


def _result_bytes(result: Prepared) -> int:
    return result.inputs.patches.nbytes if isinstance(result, Request) else 0
