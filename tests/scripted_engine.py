"""An engine that does what its script says, for tests of what runs it: it can die, raise, or be slow."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from glm4v_batch.engines import EngineEvent
from glm4v_batch.errors import PlacementError
from glm4v_batch.types import BatchRun, BatchShape, BatchStart, Completion, Failure, Request


@dataclass(frozen=True)
class Script:
    """What an engine does. *journal* is a folder in which it leaves a file per batch that it began.

    Its first batch lasts until all engines that *first_batch_with* names have begun one.
    """

    journal: Path
    name: str = "a"
    batch_size: int = 4
    batch_seconds: float = 0.0
    deadly_rows: tuple[int, ...] = ()
    raising_rows: tuple[int, ...] = ()
    dies_once_at_row: int | None = None
    loading: str = "works"
    crowded_after: int | None = None
    first_batch_with: str = ""
    second_batch_waits_for_drain: bool = False


class ScriptedEngine:
    def __init__(self, script: Script) -> None:
        self._script = script
        self._is_draining = False
        self._num_batches = 0

    def held_bytes(self) -> tuple[int, ...]:
        return (1000,)

    def drain(self) -> None:
        self._is_draining = True

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        requests = (item for item in items if isinstance(item, Request))
        while not self._is_draining and (batch := list(islice(requests, self._script.batch_size))):
            yield BatchStart(tuple((r.chunk_id, r.row) for r in batch))
            self._act([r.row for r in batch])
            yield from (_answer(r, self._script.name) for r in batch)
            yield _batch_run(len(batch))

    def _act(self, rows: list[int]) -> None:
        script = self._script
        entry = f"{time.monotonic_ns():020}-{script.name}-{'_'.join(map(str, rows))}"
        (script.journal / entry).touch()
        time.sleep(script.batch_seconds)
        if not self._num_batches:
            _wait(lambda: {*script.first_batch_with} <= {name for name, _ in batches(script.journal)})
        elif script.second_batch_waits_for_drain:
            _wait(lambda: self._is_draining)
        if self._num_batches == script.crowded_after:
            raise PlacementError("other processes have taken the memory", hint="free the GPU")
        self._num_batches += 1
        if {*rows} & {*script.deadly_rows}:
            os.kill(os.getpid(), signal.SIGKILL)
        if {*rows} & {*script.raising_rows}:
            raise ValueError("the model is confused")
        if script.dies_once_at_row in rows and not (script.journal / "died").exists():
            (script.journal / "died").touch()
            os._exit(0)


def load(script: Script) -> ScriptedEngine:
    """The engine of *script*, or what its loading does instead."""
    match script.loading:
        case "dies":
            os._exit(3)
        case "user's mistake":
            raise PlacementError("does not fit", hint="buy a larger card")
        case "shows a bar":
            list(tqdm([1, 2, 3], file=StringIO()))
        case "takes a second":
            time.sleep(1)
        case "waits until it is told":
            _wait(lambda: (script.journal / "told").exists())
        case "takes long":
            time.sleep(60)
    return ScriptedEngine(script)


def batches(journal: Path) -> list[tuple[str, list[int]]]:
    """The batches that engines began, in order: the engine's name and the rows."""
    entries = (path.name.split("-") for path in sorted(journal.glob("*-*-*")))
    return [(name, [int(row) for row in rows.split("_")]) for _, name, rows in entries]


def _wait(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _answer(request: Request, name: str) -> Completion:
    return Completion(
        record_id=request.record_id,
        chunk_id=request.chunk_id,
        row=request.row,
        text=f"by {name}",
        finish_reason="stop",
        prompt_tokens=request.prompt_tokens,
        completion_tokens=1,
    )


def _batch_run(size: int) -> BatchRun:
    return BatchRun(BatchShape(size, size, 0, size, size), (), (), (), False, 0.1, size, size)
