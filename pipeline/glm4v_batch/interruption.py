"""Signals that ask a run to end. While it is only being prepared they end it at once, as Ctrl-C does."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run to end."""

_AGAIN_SECONDS = 0.01


class SignalledError(BaseException):
    """A signal came while nothing was in hand that would be worth waiting for."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def heeded() -> list[signal.Signals]:
    """Those of `ENDING` that this process heeds: nohup and job runners ignore a signal on purpose."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def let_the_next_one_end_it() -> None:
    """Have the next signal end the process at once: it is not ours any more."""
    for number in heeded():
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have a signal end what is done inside by SignalledError; only the main thread may call this."""

    def end(number: int, _frame: FrameType | None) -> None:
        let_the_next_one_end_it()
        # What is left open in the middle of an import ends with the process.
        warnings.simplefilter("ignore", ResourceWarning)
        raise SignalledError(number)

    def again(dropped: SignalledError) -> None:
        signal.signal(dropped.signal_number, end)
        # Not here, where an exception would be dropped again.
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), dropped.signal_number)).start()

    previous = {number: signal.signal(number, end) for number in heeded()}
    try:
        with _told_what_python_drops(again):
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _told_what_python_drops(tell: Callable[[SignalledError], None]) -> Iterator[None]:
    """Hand a SignalledError to *tell* that Python would print and drop: a callback may raise nothing."""
    otherwise = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, SignalledError):
            tell(unraisable.exc_value)
        else:
            otherwise(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = otherwise
