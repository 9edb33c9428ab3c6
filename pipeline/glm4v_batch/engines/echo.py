"""An engine without a model: the text is a hash of pixels and prompt, so a run can be checked anywhere."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from glm4v_batch.engines import EngineEvent
from glm4v_batch.scheduler import batch_shape
from glm4v_batch.types import BatchRun, BatchStart, Completion, Failure, Request


class EchoEngine:
    """Answers with hashes, *batch_size* requests at a time, each batch taking *batch_seconds*."""

    def __init__(self, batch_size: int = 64, batch_seconds: float = 0.0) -> None:
        self._batch_size = batch_size
        self._batch_seconds = batch_seconds
        self._is_draining = False

    def drain(self) -> None:
        """See `Engine.drain`."""
        self._is_draining = True

    def held_bytes(self) -> tuple[int, ...]:
        """Nothing."""
        return ()

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        """See `Engine.run`; the order is kept."""
        iterator = iter(items)
        while not self._is_draining and (batch := list(islice(iterator, self._batch_size))):
            requests = [item for item in batch if isinstance(item, Request)]
            if requests:
                yield BatchStart(tuple(request.key for request in requests))
            if requests and self._batch_seconds:
                time.sleep(self._batch_seconds)  # stands for a model's work
            yield from (_echo(item) if isinstance(item, Request) else item for item in batch)
            if requests:
                yield self._batch_run(requests)

    def _batch_run(self, requests: list[Request]) -> BatchRun:
        return BatchRun(
            shape=batch_shape(requests),
            predicted_bytes=(),
            peak_bytes=(),
            budget_bytes=(),
            out_of_memory=False,
            seconds=self._batch_seconds,
            prompt_tokens=sum(r.prompt_tokens for r in requests),
            completion_tokens=len(requests),
        )


@dataclass(frozen=True, slots=True)
class EchoSettings:
    """What an echo engine is made of."""

    batch_size: int = 64
    batch_seconds: float = 0.0


def load_echo(settings: EchoSettings) -> EchoEngine:
    """The engine of *settings*, for a replica's process."""
    return EchoEngine(settings.batch_size, settings.batch_seconds)


def _echo(request: Request) -> Completion:
    digest = hashlib.sha256(np.ascontiguousarray(request.inputs.input_ids).data)
    digest.update(np.ascontiguousarray(request.inputs.patches).data)
    digest.update(repr(request.inputs.image_grid_thw).encode())
    return Completion(
        record_id=request.record_id,
        chunk_id=request.chunk_id,
        row=request.row,
        text=digest.hexdigest(),
        finish_reason="stop",
        prompt_tokens=request.prompt_tokens,
        completion_tokens=1,
    )
