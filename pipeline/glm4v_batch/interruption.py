"""Signals that ask a run to end. While it is only being prepared they end it at once, as Ctrl-C does."""

import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
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
    """Have a signal end what is done inside by SignalledError; only the main thread may call this.

    What a handler raises may be dropped on its way: by Python in a callback, by C code that clears the
    error of something that it only tried, as imports do. So an error that dies before it comes here has
    its signal sent again, and one that comes wrapped in another counts as come.
    """
    underway: list[weakref.ref[SignalledError]] = []

    def end(number: int, _frame: FrameType | None) -> None:
        let_the_next_one_end_it()
        # What is left open in the middle of an import ends with the process.
        warnings.simplefilter("ignore", ResourceWarning)
        raise followed(SignalledError(number))

    def followed(error: SignalledError) -> SignalledError:
        # Not by *end* itself: its frame is in the traceback, and would keep the error alive.
        number = error.signal_number
        underway[:] = [weakref.ref(error, lambda _: again(number))]
        return error

    def again(number: int) -> None:
        if signal.getsignal(number) == signal.SIG_DFL:  # nobody has taken over meanwhile
            signal.signal(number, end)
        # Not here, where an exception would be dropped again.
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()

    previous = {number: signal.signal(number, end) for number in heeded()}
    try:
        with _silent_when_dropped():
            yield
    except Exception as error:
        signalled = underway[0]() if underway else None
        if signalled is None:
            raise
        raise signalled from error
    finally:
        underway.clear()  # a reference that is gone itself calls nobody
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _silent_when_dropped() -> Iterator[None]:
    """Have nothing printed of a SignalledError that Python drops: it comes again."""
    otherwise = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, SignalledError):
            otherwise(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = otherwise
