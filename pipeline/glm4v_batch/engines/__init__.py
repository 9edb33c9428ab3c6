"""Engines: what turns requests into answers. All of them give the same kind of results."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from glm4v_batch.types import (
    BatchRun,
    BatchStart,
    Failure,
    Heartbeat,
    ReplicaLost,
    ReplicaReady,
    Request,
    Result,
)

EngineEvent = Result | BatchStart | BatchRun | ReplicaReady | ReplicaLost | Heartbeat


class Engine(Protocol):
    """Answers requests in batches of its own choosing."""

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        """Yield exactly one result per item, in any order, and what happens on the way.

        Failures pass through. Items are pulled only as fast as they are needed.
        """
        ...

    def drain(self) -> None:
        """End `run` after the batches in hand, without answers for what else was pulled."""
        ...

    def held_bytes(self) -> tuple[int, ...]:
        """What the loaded model holds on each device."""
        ...
