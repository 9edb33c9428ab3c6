"""The main loop: records in, parts out; every row on the way is a value, a failed one too."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Protocol

from glm4v_batch.engines import Engine, EngineEvent
from glm4v_batch.errors import SourceError
from glm4v_batch.output import Output
from glm4v_batch.parts import Part
from glm4v_batch.plan import Plan
from glm4v_batch.retry import Replaced
from glm4v_batch.types import Chunk, Completion, Failure, Record, Request, Result

Item = tuple[Chunk, Record]
Preprocess = Callable[[Iterable[Item]], Generator[Request | Failure, None, None]]


class Collects(Protocol):
    """Holds results until those of a part are complete."""

    def add(self, result: Result) -> Part | Replaced | None:
        """Take a result in; the part that it completes, once that is durable, or None."""
        ...


def work(
    records: Iterable[Item], preprocess: Preprocess, engine: Engine, output: Collects
) -> Generator[Part | Replaced | EngineEvent, None, None]:
    """Run *records* through the pipe; yield what the engine tells, and each part once it is durable.

    Whoever stops at a result keeps it, and the part that it would complete, out of the output. Where the
    source cannot be read any further, what was read of it is done first.
    """
    readable = _UntilTrouble(records)
    with closing(preprocess(readable)) as requests:
        for event in engine.run(requests):
            yield event
            if isinstance(event, (Completion, Failure)):
                part = output.add(event)
                if part is not None:
                    yield part
    if readable.trouble is not None:
        raise readable.trouble


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


def new_records(plan: Plan, chunks: Iterable[Chunk], output: Output) -> Iterator[Item]:
    """The records of *chunks*, which *output* is told to expect."""
    for chunk in chunks:
        output.begin(chunk, plan.identity_of(chunk))
        for record in plan.opened.source.read(chunk):
            output.expect(chunk, record)
            yield chunk, record
