"""One process per replica: requests go to whoever has room, and a replica that dies costs no record.

The driver keeps every request until its answer is there. What a lost replica held goes to another;
requests of batches that have killed two replicas are run one by one, until the guilty one is a failed row.
"""

import math
import pickle
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from glm4v_batch.child import Child
from glm4v_batch.engines import EngineEvent
from glm4v_batch.errors import Glm4vBatchError, PlacementError, sanitise
from glm4v_batch.replica_process import Crashed, Drain, Flush, Idle, Loaded, LoadEngine, Took, serve
from glm4v_batch.types import (
    BatchRun,
    BatchStart,
    Completion,
    Failure,
    Heartbeat,
    ReplicaLost,
    ReplicaReady,
    Request,
)

_HEARTBEAT_SECONDS = 1.0
# What a replica may be sent before its engine asks for it: it must never wait for the driver.
_AHEAD_REQUESTS = 32
_AHEAD_BYTES = 64 * 1024**2
# What may wait here for a replica with room.
_WAITING_REQUESTS = 64
_WAITING_BYTES = 256 * 1024**2
_DEATHS_UNTIL_ALONE = 2
# Twice, for one death may be the kernel's or an operator's doing.
_DEATHS_ALONE = 2
_LOADING_DEATHS = 3
# A guilty record costs four deaths, and is an outcome then.
_BARREN_DEATHS = 8
_CRASHED_IN_A_ROW = 10

_Key = tuple[str, int]


Learn = Callable[[Any, BatchRun], Any]
"""The settings of a replica that has run a batch, for its next start."""


def _learn_nothing(settings: Any, _: BatchRun) -> Any:
    return settings


class ReplicasLostError(Exception):
    """Replicas die again and again without an answer between: a bug, or trouble of the machine."""


class Replicas:
    """An engine made of engines: *load* makes one in a process of its own for each of *settings*.

    *num_expected* is how many items will come, None where nobody knows: with it, the last ones are
    spread evenly. After a batch *learn* makes of its replica's settings those that it is started again with.
    """

    def __init__(
        self,
        load: LoadEngine,
        settings: Sequence[Any],
        num_expected: int | None = None,
        learn: Learn = _learn_nothing,
    ) -> None:
        self._load = load
        self._learn = learn
        self._settings = list(settings)
        self._num_expected = num_expected
        self._num_ended = 0
        self._replicas: list[_Replica] = []
        self._waiting: deque[Request] = deque()
        self._alone: deque[Request] = deque()
        self._suspicions: defaultdict[_Key, _Suspicion] = defaultdict(_Suspicion)
        self._num_crashed_in_a_row = 0
        self._last_event = time.monotonic()
        self._is_draining = False

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        """See `Engine.run`. Raises what a replica's loading raises for a user's mistake, PlacementError
        where no replica is left with room on its GPUs, and ReplicasLostError where replicas only ever die.
        """
        try:
            for index in range(len(self._settings)):
                self._replicas.append(_Replica(index, self._start(index)))
            yield from self._pull(items)
            while self._is_working():
                self._dispatch(more_to_come=False)
                yield from self._receive(_HEARTBEAT_SECONDS)
        finally:
            for replica in self._replicas:
                replica.child.kill()  # all at once: a card takes a while to let go
            for replica in self._replicas:
                replica.child.end(grace_seconds=0)

    def drain(self) -> None:
        """See `Engine.drain`. Requests that wait here or in a replica's pool are dropped."""
        self._is_draining = True
        self._waiting.clear()
        self._alone.clear()
        for replica in self._replicas:
            if replica.unanswered:
                replica.send_message(Drain())

    def held_bytes(self) -> tuple[int, ...]:
        """Nothing in this process."""
        return ()

    def _pull(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        for item in items:
            if isinstance(item, Failure):
                self._num_ended += 1
                yield item
            else:
                self._waiting.append(item)
            self._dispatch(more_to_come=True)
            yield from self._receive(0)
            while self._is_full():
                yield from self._receive(_HEARTBEAT_SECONDS)
                self._dispatch(more_to_come=True)
            if self._is_draining:
                return

    def _is_full(self) -> bool:
        num_bytes = sum(request.inputs.patches.nbytes for request in self._waiting)
        return len(self._waiting) >= _WAITING_REQUESTS or num_bytes >= _WAITING_BYTES

    def _is_working(self) -> bool:
        # A replica that has answered all still has to tell of its batch.
        is_busy = any(replica.unanswered or replica.is_flushed for replica in self._replicas)
        return bool(self._waiting or self._alone or is_busy)

    def _living(self) -> list["_Replica"]:
        return [replica for replica in self._replicas if not replica.is_given_up]

    def _trusted(self, request: Request) -> list["_Replica"]:
        """The living replicas that *request* has killed least: none of them, as long as there is one."""
        deaths = self._suspicions.get(request.key, _Suspicion()).deaths
        fewest = min(deaths[replica.index] for replica in self._living())
        return [replica for replica in self._living() if deaths[replica.index] == fewest]

    def _dispatch(self, *, more_to_come: bool) -> None:
        if self._is_draining:
            return
        self._dispatch_alone()
        share = self._share()
        kept = []
        while self._waiting and any(replica.has_room(share) for replica in self._replicas):
            request = self._waiting.popleft()
            able = [replica for replica in self._trusted(request) if replica.has_room(share)]
            if able:
                min(able, key=lambda replica: len(replica.unanswered)).send(request)
            else:
                kept.append(request)
        self._waiting.extendleft(reversed(kept))
        for replica in self._replicas:
            has_all = len(replica.unanswered) >= share or not (self._waiting or more_to_come)
            if replica.unanswered and has_all and not replica.is_flushed:
                replica.flush()

    def _dispatch_alone(self) -> None:
        kept = []
        while self._alone:
            request = self._alone.popleft()
            able = self._trusted(request)
            idle = next((replica for replica in able if replica.is_idle), None)
            if idle is not None:
                idle.send_alone(request)
                continue
            kept.append(request)
            # One of them has to empty itself for it.
            if not any(replica.is_flushed or not replica.is_ready for replica in able):
                min(able, key=lambda replica: len(replica.unanswered)).flush()
        self._alone.extend(kept)

    def _share(self) -> float:
        """How many unanswered requests one replica may hold: of those that are left, its part."""
        if self._num_expected is None:
            return math.inf
        left = max(self._num_expected - self._num_ended, 1)
        return math.ceil(left / max(1, len(self._living())))

    def _receive(self, timeout_seconds: float) -> Iterator[EngineEvent]:
        """Hand on what the replicas have sent, waiting for the first of it; a sign of life each second."""
        running = [replica for replica in self._replicas if not replica.is_ended]
        ready = set(wait([replica.child.pipe for replica in running], timeout_seconds))
        for replica in running:
            if replica.child.pipe in ready:
                for event in self._read(replica):
                    self._last_event = time.monotonic()
                    yield event
        if time.monotonic() - self._last_event >= _HEARTBEAT_SECONDS:
            self._last_event = time.monotonic()
            yield Heartbeat()

    def _read(self, replica: "_Replica") -> Iterator[EngineEvent]:
        try:
            message = pickle.loads(replica.child.pipe.recv_bytes())  # noqa: S301  from our own process
        except (EOFError, OSError):
            end = replica.child.end(grace_seconds=1)
            end.refuse_unguarded()
            yield from self._lose(replica, f"its process died: {end}")
            return
        match message:
            case PlacementError() if self._is_draining or len(self._living()) > 1:
                # Its GPUs have no room, which is no reason for the others to stop. While it loads that may
                # pass, and it is tried as often as one that dies.
                replica.child.end(grace_seconds=0)
                replica.has_no_room = replica.is_ready
                yield from self._lose(replica, f"{message} {message.hint}".strip())
            case Glm4vBatchError():
                raise message
            case Crashed():
                replica.child.end(grace_seconds=0)
                yield from self._lose(replica, message.summary, message.trace)
            case Loaded():
                replica.is_ready, replica.num_loading_deaths = True, 0
                yield ReplicaReady(replica.index, message.seconds, message.held_bytes)
            case Took():
                replica.ahead_bytes.popleft()
            case Idle():
                is_done = self._is_draining or not replica.unanswered
                assert is_done, "an engine has left requests without answer"
                replica.rest()
            case _:
                yield self._event(replica, message)

    def _event(self, replica: "_Replica", event: EngineEvent) -> EngineEvent:
        match event:
            case BatchStart():
                replica.in_hand = frozenset(event.rows)
            case BatchRun():
                self._settings[replica.index] = self._learn(self._settings[replica.index], event)
                return replace(event, replica=replica.index)
            case Completion() | Failure():
                del replica.unanswered[event.chunk_id, event.row]
                self._suspicions.pop((event.chunk_id, event.row), None)
                self._num_ended += 1
                replica.num_barren_deaths = 0
                if isinstance(event, Completion):
                    self._num_crashed_in_a_row = 0
        return event

    def _lose(self, replica: "_Replica", reason: str, trace: str = "") -> Iterator[EngineEvent]:
        """Share out what *replica* held, and start it anew unless it only ever dies."""
        short = sanitise(reason)
        held = list(replica.unanswered.values())
        replica.count_death()
        yield ReplicaLost(replica.index, short, len(held), is_final=replica.is_given_up, trace=trace)
        if not self._is_draining:
            yield from self._requeue(held, replica, short)
        self._refuse_endless_deaths(replica, trace or reason)
        replica.forget()
        if replica.is_given_up or self._is_draining:
            replica.is_ended = True
        else:
            self._start_anew(replica)

    def _start_anew(self, replica: "_Replica") -> None:
        try:
            replica.child = self._start(replica.index)
        except PlacementError:
            # The system starts no process now; the others have theirs.
            replica.is_given_up = replica.is_ended = True
            if not self._living():
                raise

    def _requeue(self, held: Sequence[Request], replica: "_Replica", reason: str) -> Iterator[Failure]:
        for request in reversed(held):
            key = request.key
            if key in replica.suspects and not replica.has_no_room:
                self._suspicions[key].add(replica)
            suspicion = self._suspicions.get(key, _Suspicion())
            if suspicion.is_guilty:
                self._num_ended += 1
                self._num_crashed_in_a_row += 1
                replica.num_barren_deaths = 0  # an outcome, too
                yield _crash_of(request, self._suspicions.pop(key), reason)
            else:
                (self._alone if suspicion.is_suspect else self._waiting).appendleft(request)

    def _refuse_endless_deaths(self, replica: "_Replica", reason: str) -> None:
        """Give up on the run where no replica is left, or record after record kills them."""
        if self._is_draining:
            return
        if not self._living() or self._num_crashed_in_a_row >= _CRASHED_IN_A_ROW:
            raise ReplicasLostError(
                f"replicas only ever die; the last one was replica {replica.index}: {reason}"
            )

    def _start(self, index: int) -> Child:
        return Child(serve, self._load, self._settings[index], name="glm4v-replica")


@dataclass(slots=True)
class _Suspicion:
    """How often a request was in the batch in hand when replicas died, by replica, and how often alone."""

    deaths: Counter[int] = field(default_factory=Counter)
    num_alone: int = 0

    def add(self, replica: "_Replica") -> None:
        self.deaths[replica.index] += 1
        self.num_alone += replica.is_alone

    @property
    def is_suspect(self) -> bool:
        """Whether it is to be run alone from now on."""
        return self.deaths.total() >= _DEATHS_UNTIL_ALONE

    @property
    def is_guilty(self) -> bool:
        return self.num_alone >= _DEATHS_ALONE


@dataclass(slots=True, eq=False)
class _Replica:
    """What the driver knows of one replica."""

    index: int
    child: Child
    is_ready: bool = False
    is_flushed: bool = False
    is_alone: bool = False
    is_ended: bool = False
    is_given_up: bool = False
    has_no_room: bool = False
    num_loading_deaths: int = 0
    num_barren_deaths: int = 0
    unanswered: dict[_Key, Request] = field(default_factory=dict)
    ahead_bytes: deque[int] = field(default_factory=deque)
    in_hand: frozenset[_Key] = frozenset()

    @property
    def is_idle(self) -> bool:
        """Whether it can work and has nothing to do."""
        return self.is_ready and not self.unanswered and not self.is_flushed

    @property
    def suspects(self) -> Set[_Key]:
        """The requests that may have killed it: those of the batch in hand, or else all of them."""
        return self.in_hand & self.unanswered.keys() or self.unanswered.keys()

    def has_room(self, share: float) -> bool:
        """Whether it may be sent another request, of which *share* may be unanswered."""
        ahead = len(self.ahead_bytes) < _AHEAD_REQUESTS and sum(self.ahead_bytes) < _AHEAD_BYTES
        return self.is_ready and not self.is_flushed and ahead and len(self.unanswered) < share

    def send(self, request: Request) -> None:
        """Have it answer *request* together with others."""
        self.unanswered[request.key] = request
        self.ahead_bytes.append(request.inputs.patches.nbytes)
        self.send_message(request)

    def send_alone(self, request: Request) -> None:
        """Have it answer *request* with no other."""
        self.is_alone = True
        self.send(request)
        self.flush()

    def flush(self) -> None:
        """Have it answer what it holds without waiting for more to choose from."""
        self.is_flushed = True
        self.send_message(Flush())

    def send_message(self, message: object) -> None:
        """Send *message* without waiting; that it is dead is noticed where its pipe is read."""
        self.child.post(pickle.dumps(message, protocol=5))

    def count_death(self) -> None:
        """Count a death, and give it up where it cannot load, never answers or has no room."""
        if self.is_ready:
            self.num_barren_deaths += 1
        else:
            self.num_loading_deaths += 1
        self.is_given_up = (
            self.has_no_room
            or self.num_loading_deaths >= _LOADING_DEATHS
            or self.num_barren_deaths >= _BARREN_DEATHS
        )

    def rest(self) -> None:
        """It has answered all that it held, or will not answer the rest any more."""
        self.is_flushed = self.is_alone = False
        self.unanswered.clear()

    def forget(self) -> None:
        """Its process is gone, and with it all that it held."""
        self.is_ready = self.is_flushed = self.is_alone = False
        self.unanswered.clear()
        self.ahead_bytes.clear()
        self.in_hand = frozenset()


def _crash_of(request: Request, suspicion: _Suspicion, reason: str) -> Failure:
    message = (
        f"replicas died over it {suspicion.deaths.total()} times, the last "
        f"{suspicion.num_alone} with nothing else in hand: {reason}"
    )
    return request.failed("replica_crashed", sanitise(message))
