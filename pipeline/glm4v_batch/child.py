"""A child process and the pipe to it: no signal of the terminal reaches it, and it dies with this process.

Children come from a fork server: not from this process, whose threads may hold locks, and not each
from an interpreter of its own, which would import everything anew.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What the fork server imports once, so that the child which replaces a lost one starts at once.
_PRELOADED = ["glm4v_batch.preprocess"]


class Child:
    """A process that runs `target(pipe, *arguments)`, which must be importable there.

    *name* is what `ps`, `top` and the kernel's log call it, of which Linux keeps 15 characters.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, name: str) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, target, arguments), name=name, daemon=True)
        with _signals_blocked():
            self._process.start()
        theirs.close()  # or the child's death would not end the pipe

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the process; whoever waits at its pipe meets the end of it."""
        self._process.kill()
        self._process.join()

    def end(self, *, grace_seconds: float) -> str:
        """Make sure that the process is gone, and say how it ended."""
        self._process.join(grace_seconds)  # of one that is dying, its own exit code says more than our kill
        self.kill()
        self.pipe.close()
        code = self._process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep from all that is started inside the signals that a terminal sends the whole group.

    The fork server and the children inherit this, so that none of them is interrupted while it still
    imports. This process decides, and ends them by SIGKILL.
    """
    # Starting the tracker unblocks signals again, so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
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
    pipe that tells of the parent's end is made to raise SIGIO instead, whose default is to end us.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if not parent.is_alive():  # it ended before the signal was set
        sys.exit()
