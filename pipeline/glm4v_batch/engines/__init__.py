"""Engines: what turns requests into answers. All of them give the same kind of results."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from glm4v_batch.types import BatchRun, Failure, Request, Result


class Engine(Protocol):
    """Answers requests in batches of its own choosing."""

    def run(self, items: Iterable[Request | Failure]) -> Iterator[Result | BatchRun]:
        """Yield exactly one result per item, in any order, and what each batch took.

        Failures pass through. Items are pulled only as fast as they are needed.
        """
        ...
