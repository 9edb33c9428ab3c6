"""The inside of a replica's process: requests come from a pipe to the engine, its events go back."""

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from glm4v_batch.engines import Engine
from glm4v_batch.errors import Glm4vBatchError, first_line
from glm4v_batch.types import Request

LoadEngine = Callable[[Any], Engine]
"""Makes an engine of its settings. Must be importable in the replica's process."""


@dataclass(frozen=True, slots=True)
class Flush:
    """To the replica: answer all that was sent; nothing comes after it for now."""


@dataclass(frozen=True, slots=True)
class Drain:
    """To the replica: end after the batch in hand."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """From the replica: it can work."""

    seconds: float
    held_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Took:
    """From the replica: its engine has taken one more of the requests sent."""


@dataclass(frozen=True, slots=True)
class Idle:
    """From the replica: all that was sent before `Flush` is answered."""


@dataclass(frozen=True, slots=True)
class Crashed:
    """From the replica: an error that nobody expected ends it."""

    summary: str
    trace: str


def serve(pipe: Connection, load: LoadEngine, settings: Any) -> None:
    """Load the engine, then answer what comes through *pipe* until its other end is closed."""
    # A library's progress bar makes a lock for many processes, and this one ends without giving it back.
    tqdm.set_lock(threading.RLock())
    outbox = _Outbox(pipe)
    try:
        _work(pipe, outbox, load, settings)
    except Glm4vBatchError as error:  # the driver raises it
        outbox.send(error)
    except Exception as error:  # the border of the process: the driver decides what it means
        # torch's messages go on with hints for its developers.
        summary = f"{type(error).__name__}: {first_line(error, with_quotes=True)}"
        outbox.send(Crashed(summary, traceback.format_exc()))


def _work(pipe: Connection, outbox: "_Outbox", load: LoadEngine, settings: Any) -> None:
    started = time.perf_counter()
    engine = load(settings)
    outbox.send(Loaded(time.perf_counter() - started, engine.held_bytes()))
    inbox = _Inbox(pipe, outbox, engine)
    while not inbox.is_draining:
        for event in engine.run(inbox.until_flush()):
            outbox.send(event)
        outbox.send(Idle())
    inbox.wait_for_end()


class _Inbox:
    """What has arrived and is not taken yet. A thread reads, so that the driver never waits to write."""

    def __init__(self, pipe: Connection, outbox: "_Outbox", engine: Engine) -> None:
        self._pipe = pipe
        self._outbox = outbox
        self._engine = engine
        self._arrived: SimpleQueue[Request | Flush | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="inbox", daemon=True)
        self._thread.start()
        self.is_draining = False

    def until_flush(self) -> Iterator[Request]:
        while isinstance(arrived := self._arrived.get(), Request):
            self._outbox.send(Took())
            yield arrived
        if isinstance(arrived, Exception):
            raise arrived

    def wait_for_end(self) -> None:
        """Wait for the driver to close the pipe, which ends the process."""
        self._thread.join()

    def _read(self) -> None:
        while True:
            try:
                content = self._pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)  # the driver has closed the pipe: nobody wants the answers
            try:
                self._take(pickle.loads(content))  # noqa: S301  from our own driver
            except Exception as error:  # the border of the thread: the engine's meets it
                self._arrived.put(error)

    def _take(self, message: Request | Flush | Drain) -> None:
        if isinstance(message, Drain):
            self.is_draining = True
            self._engine.drain()
            message = Flush()
        self._arrived.put(message)


class _Outbox:
    """The way to the driver, for several threads: an engine may take requests in one of its own."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        content = pickle.dumps(message, protocol=5)
        with self._lock, suppress(OSError):  # the driver is gone, and this process is about to be
            self._pipe.send_bytes(content)
