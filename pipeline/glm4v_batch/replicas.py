"""One process per replica: requests go to whoever has room, and a replica that dies costs no record.

The driver keeps every request until its answer is there. What a lost replica held goes to another;
requests of batches that have killed two replicas are run one by one, until the guilty one is a failed row.
"""

import math
import pickle
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from glm4v_batch.child import Child
from glm4v_batch.engines import EngineEvent
from glm4v_batch.errors import Glm4vBatchError, sanitise
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
# A record that kills costs three deaths without an answer between them; this lets two in a row pass.
_BARREN_DEATHS = 7
_LOADING_DEATHS = 3

_Key = tuple[str, int]


class ReplicasLostError(Exception):
    """Replicas die again and again without an answer between: a bug, or trouble of the machine."""


class Replicas:
    """An engine made of engines: *load* makes one in a process of its own for each of *settings*.

    *num_expected* is how many items will come, None where nobody knows: with it, the last ones are
    spread evenly.
    """

    def __init__(self, load: LoadEngine, settings: Sequence[Any], num_expected: int | None = None) -> None:
        self._load = load
        self._settings = settings
        self._num_expected = num_expected
        self._num_ended = 0
        self._replicas: list[_Replica] = []
        self._waiting: deque[Request] = deque()
        self._alone: deque[Request] = deque()
        self._deaths: Counter[_Key] = Counter()
        self._num_barren_deaths = 0
        self._is_draining = False

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        """See `Engine.run`. Raises what a replica's loading raises for a user's mistake, and
        ReplicasLostError where replicas only ever die.
        """
        try:
            for index, settings in enumerate(self._settings):
                self._replicas.append(_Replica(index, self._start(settings)))
            yield from self._pull(items)
            while self._is_working():
                self._dispatch(more_to_come=False)
                yield from self._receive(_HEARTBEAT_SECONDS)
        finally:
            for replica in self._replicas:
                replica.child.end(grace_seconds=0)

    def drain(self) -> None:
        """See `Engine.drain`. Requests that wait here or in a replica's pool are dropped."""
        self._is_draining = True
        self._waiting.clear()
        self._alone.clear()
        for replica in self._replicas:
            if replica.unanswered:
                replica.write(Drain())

    def held_bytes(self) -> tuple[int, ...]:
        """Nothing in this process."""
        return ()

    def _pull(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        for item in items:
            if isinstance(item, Failure):
                self._num_ended += 1
                yield item
                continue
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

    def _dispatch(self, *, more_to_come: bool) -> None:
        if self._is_draining:
            return
        for replica in self._replicas:
            if self._alone and replica.is_idle:
                replica.send_alone(self._alone.popleft())
        share = self._share()
        while self._waiting and (open_ones := [r for r in self._replicas if r.has_room(share)]):
            min(open_ones, key=lambda r: len(r.unanswered)).send(self._waiting.popleft())
        for replica in self._replicas:
            has_all = len(replica.unanswered) >= share or not (self._waiting or more_to_come)
            if replica.unanswered and has_all and not replica.is_flushed:
                replica.flush()

    def _share(self) -> float:
        """How many unanswered requests one replica may hold: of those that are left, its part."""
        if self._num_expected is None:
            return math.inf
        left = max(self._num_expected - self._num_ended, 1)
        return math.ceil(left / max(1, sum(not r.is_given_up for r in self._replicas)))

    def _receive(self, timeout_seconds: float) -> Iterator[EngineEvent]:
        """Hand on what the replicas have sent, waiting for the first of it."""
        living = [replica for replica in self._replicas if not replica.is_ended]
        ready = set(wait([replica.child.pipe for replica in living], timeout_seconds))
        for replica in living:
            if replica.child.pipe in ready:
                yield from self._read(replica)
        if timeout_seconds and not ready:
            yield Heartbeat()

    def _read(self, replica: "_Replica") -> Iterator[EngineEvent]:
        try:
            message = pickle.loads(replica.child.pipe.recv_bytes())  # noqa: S301  from our own process
        except (EOFError, OSError):
            yield from self._lose(replica, f"its process died: {replica.child.end(grace_seconds=1)}")
            return
        match message:
            case Glm4vBatchError():
                raise message
            case Crashed():
                replica.child.end(grace_seconds=0)
                yield from self._lose(replica, message.trace)
            case Loaded():
                replica.begin()
                yield ReplicaReady(replica.index, message.seconds, message.held_bytes)
            case Took():
                replica.ahead_bytes.popleft()
            case Idle():
                assert self._is_draining or not replica.unanswered, (
                    "an engine has left requests without answer"
                )
                replica.rest()
            case _:
                yield self._event(replica, message)

    def _event(self, replica: "_Replica", event: EngineEvent) -> EngineEvent:
        match event:
            case BatchStart():
                replica.in_hand = frozenset(event.rows)
            case BatchRun():
                return replace(event, replica=replica.index)
            case Completion() | Failure():
                del replica.unanswered[event.chunk_id, event.row]
                self._num_ended += 1
                if isinstance(event, Completion):
                    self._num_barren_deaths = 0
        return event

    def _lose(self, replica: "_Replica", reason: str) -> Iterator[EngineEvent]:
        """Share out what *replica* held, and start it anew. *reason* ends with what matters most."""
        self._num_barren_deaths += 1
        replica.num_loading_deaths += not replica.is_ready
        short = sanitise(reason.strip().rsplit("\n", 1)[-1])
        held = list(replica.unanswered.values())
        yield ReplicaLost(replica.index, short, len(held))
        if replica.is_alone and held:
            self._num_ended += 1
            yield _crash_of(held.pop(), short)
        if not self._is_draining:
            self._requeue(held, replica.suspects)
        self._refuse_endless_deaths(replica, reason)
        replica.forget()
        if replica.is_given_up or self._is_draining:
            replica.is_ended = True
        else:
            replica.child = self._start(self._settings[replica.index])

    def _requeue(self, held: Sequence[Request], suspects: Iterable[_Key]) -> None:
        self._deaths.update(suspects)
        for request in reversed(held):
            is_guilty = self._deaths[_key(request)] >= _DEATHS_UNTIL_ALONE
            (self._alone if is_guilty else self._waiting).appendleft(request)

    def _refuse_endless_deaths(self, replica: "_Replica", reason: str) -> None:
        """Give up on a replica that cannot load, and on the run where nothing is answered any more."""
        replica.is_given_up = replica.num_loading_deaths >= _LOADING_DEATHS
        if self._num_barren_deaths >= _BARREN_DEATHS or all(r.is_given_up for r in self._replicas):
            raise ReplicasLostError(
                f"replicas died {self._num_barren_deaths} times without an answer between; "
                f"the last one, replica {replica.index}:\n{reason}"
            )

    def _start(self, settings: Any) -> Child:
        return Child(serve, self._load, settings, name="glm4v-replica")


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
    num_loading_deaths: int = 0
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
        self.unanswered[_key(request)] = request
        self.ahead_bytes.append(request.inputs.patches.nbytes)
        self.write(request)

    def send_alone(self, request: Request) -> None:
        """Have it answer *request* with no other."""
        self.is_alone = True
        self.send(request)
        self.flush()

    def flush(self) -> None:
        """Have it answer what it holds without waiting for more to choose from."""
        self.is_flushed = True
        self.write(Flush())

    def write(self, message: object) -> None:
        """Send *message*; that the replica is dead is noticed where its pipe is read."""
        with suppress(OSError):
            self.child.pipe.send_bytes(pickle.dumps(message, protocol=5))

    def begin(self) -> None:
        """It has loaded its model."""
        self.is_ready, self.num_loading_deaths = True, 0

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


def _key(request: Request) -> _Key:
    return request.chunk_id, request.row


def _crash_of(request: Request, reason: str) -> Failure:
    return Failure(
        record_id=request.record_id,
        chunk_id=request.chunk_id,
        row=request.row,
        stage="generate",
        code="replica_crashed",
        message=f"every replica that answered it died, alone with it at last: {reason}",
    )
