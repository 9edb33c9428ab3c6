"""The main loop: chunks in, parts out; every row on the way is a value, a failed one too."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace

from glm4v_batch.engines import Engine, EngineEvent
from glm4v_batch.errors import SourceError
from glm4v_batch.output import Output
from glm4v_batch.parts import Part
from glm4v_batch.plan import Plan
from glm4v_batch.types import Chunk, Completion, Failure, Record, Request

Preprocess = Callable[[Iterable[tuple[Chunk, Record]]], Generator[Request | Failure, None, None]]


def work(
    plan: Plan, chunks: Iterable[Chunk], preprocess: Preprocess, engine: Engine, output: Output
) -> Generator[Part | EngineEvent, None, None]:
    """Run *chunks* through the pipe; yield what the engine tells, and each part once it is durable.

    Where the source cannot be read any further, what was read of it is done first.
    """
    records = _UntilTrouble(_records(plan, chunks, output))
    with closing(preprocess(records)) as requests:
        for event in engine.run(requests):
            yield event
            if isinstance(event, (Completion, Failure)):
                part = output.add(event)
                if part is not None:
                    yield part
    if records.trouble is not None:
        raise records.trouble


class _UntilTrouble:
    """*items* as far as they can be read, and the *trouble* that ended them."""

    def __init__(self, items: Iterable[tuple[Chunk, Record]]) -> None:
        self._items = items
        self.trouble: SourceError | None = None

    def __iter__(self) -> Iterator[tuple[Chunk, Record]]:
        try:
            yield from self._items
        except SourceError as error:
            self.trouble = error


def _records(plan: Plan, chunks: Iterable[Chunk], output: Output) -> Iterator[tuple[Chunk, Record]]:
    for chunk in chunks:
        output.begin(chunk, plan.identity_of(chunk))
        for record in plan.opened.source.read(chunk):
            output.expect(chunk, record)
            yield chunk, replace(record, passed=None)
