"""A child process and the pipe to it: no signal of the terminal reaches it, and it dies with this process.

Children come from a fork server: not from this process, whose threads may hold locks, and not each
from an interpreter of its own, which would import everything anew.
"""

import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from glm4v_batch.errors import JobError, PlacementError

_F_SETSIG = 10  # Linux, fcntl(2); the module fcntl names it from Python 3.13 on
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What multiprocessing says of a process whose fork server has died, so that nobody knows.
_UNKNOWN_CODE = 255
# What a child ends with where the program that started it would have it start children while it imports.
_UNGUARDED_CODE = 117
# How many fork servers may end over one child, and how long one that dies still seems alive.
_FORK_SERVERS = 5
_DYING_SECONDS = 0.05
# What the fork server imports once, so that the child which replaces a lost one starts at once.
_PRELOADED = ["glm4v_batch.preprocess"]


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended: with an exit code, or by a signal, which *code* then holds negated."""

    code: int

    @property
    def was_killed(self) -> bool:
        """Whether someone else ended it, or its fork server: no input makes a process do that to itself."""
        return self.code in (-signal.SIGKILL, _UNKNOWN_CODE)

    def refuse_unguarded(self) -> None:
        """Raise JobError where the process ended because the program lacks the guard of its main module."""
        if self.code == _UNGUARDED_CODE:
            raise JobError(
                "This program starts a run while it is being imported, and the processes that help it import "
                'it once more: put what starts the run below `if __name__ == "__main__":`.'
            ) from None

    def __str__(self) -> str:
        return f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"


class Child:
    """A process that runs `target(pipe, *arguments)`, which must be importable there.

    *name* is what `ps`, `top` and the kernel's log call it, of which Linux keeps 15 characters.
    Raises PlacementError where the system starts no process.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, name: str) -> None:
        end_while_importing()
        self._start_by_some_server(target, arguments, name)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    def _start_by_some_server(
        self, target: Callable[..., None], arguments: tuple[Any, ...], name: str
    ) -> None:
        """Start the process; where its fork server ends over it, by the next one."""
        for _ in range(_FORK_SERVERS):
            try:
                return self._start(target, arguments, name)
            except (EOFError, ConnectionError) as error:
                # What the dead one may have started after all meets the end of its pipe.
                self.pipe.close()
                lost = error.with_traceback(None)  # which would keep the dead one's files open
                time.sleep(_DYING_SECONDS)
        raise PlacementError(
            f"The process {name} cannot be started: what starts it was killed or ended "
            f"{_FORK_SERVERS} times.",
            hint="The kernel kills it where memory runs out, and tells by dmesg. It ends at once where this "
            f"user may not run the Python interpreter, {sys.executable}.",
        ) from lost

    def _start(self, target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> None:
        with _refusing(name):
            context = _context()  # whose modules are files to open too
            self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, target, arguments), name=name, daemon=True)
        # A signal may end this process as soon as it is let in: what the child's end needs is done by then.
        # Theirs is closed here, or the child's death would not end the pipe.
        with _refusing(name), theirs, _signals_blocked():
            self._process.start()
            # At exit multiprocessing asks daemons to end by SIGTERM, which they ignore, and waits for them.
            Finalize(self, self._process.kill, exitpriority=10)

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def post(self, message: bytes) -> None:
        """Have *message* sent by a thread: the process may be stopped, and its pipe full."""
        self._outbox.put(message)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="outbox", daemon=True)
            self._writer.start()

    def _write(self) -> None:
        with suppress(OSError):  # its end is noticed where its pipe is read
            while (message := self._outbox.get()) is not None:
                self.pipe.send_bytes(message)

    def _end_writer(self) -> None:
        """Have nothing written any more: the pipe's number, once it is closed, may be the next child's."""
        if self._writer is None:
            return
        with suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)  # it may be full, and held by others than the process
        self._outbox.put(None)
        self._writer.join()

    def kill(self) -> None:
        """Kill the process; whoever waits at its pipe meets the end of it."""
        self._process.kill()

    def end(self, *, grace_seconds: float) -> End:
        """Make sure that the process is gone, and say how it ended."""
        self._process.join(grace_seconds)  # of one that is dying, its own exit code says more than our kill
        self.kill()
        self._process.join()
        self._end_writer()
        self.pipe.close()
        return End(self._process.exitcode or 0)


def end_while_importing() -> None:
    """End this process where it is a child that is importing the program: it is about to start a run in it.

    Not by an exception, which the program may catch. Whoever waits for the process sees it by `End`.
    """
    # multiprocessing refuses by the same attribute, with an error that only the child's stderr shows.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_UNGUARDED_CODE)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Raise PlacementError where the system refuses what a process takes."""
    try:
        yield
    except ConnectionError:
        raise  # nothing was refused: the fork server is gone
    except OSError as error:
        raise PlacementError(
            f"The process {name} cannot be started: {error.strerror or error}.",
            hint="It takes a few open files (ulimit -n), a process more (ulimit -u), and a socket in TMPDIR, "
            "whose path may have some 80 characters.",
        ) from error


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep from all that is started inside the signals that a terminal sends the whole group.

    The fork server and the children inherit this, so that none of them is interrupted while it still
    imports. This process decides, and ends them by SIGKILL.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        # The tracker ignores the others, not SIGHUP; once it is started the others are no longer blocked.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(pipe: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    with suppress(OSError):  # only Linux has this
        Path("/proc/self/comm").write_text(multiprocessing.current_process().name)
    target(pipe, *arguments)


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, even deep in a loop that is not Python's.

    Not PR_SET_PDEATHSIG: the parent is the fork server, which lives as long as any child does. The
    pipe that tells of the parent's end is made to raise SIGKILL instead, or SIGIO where only that can
    be; SIGIO waits where we are stopped.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    with suppress(OSError):
        fcntl.fcntl(parent.sentinel, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if not parent.is_alive():  # it ended before the signal was set
        sys.exit()
