"""Signals that ask a run to end. While it is only being prepared they end it at once, as Ctrl-C does."""

import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

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
    ending = _Ending()
    previous = {number: signal.signal(number, ending.handle) for number in heeded()}
    try:
        with _silent_when_dropped():
            yield
    except Exception as error:
        signalled = ending.signalled()
        if signalled is None:
            raise
        raise signalled from error
    finally:
        ending.forget()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Ending:
    """The error that a signal has raised, until it comes to where it is waited for."""

    def __init__(self) -> None:
        self._error: weakref.ref[SignalledError] | None = None
        self._to_send: list[tuple[int, threading.Timer]] = []

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Raise the error of the signal *number*."""
        let_the_next_one_end_it()
        # What is left open in the middle of an import ends with the process.
        warnings.simplefilter("ignore", ResourceWarning)
        raise self._followed(SignalledError(number))

    def _followed(self, error: SignalledError) -> SignalledError:
        # Not by *handle* itself: its frame is in the traceback, and would keep the error alive.
        number = error.signal_number
        self._error = weakref.ref(error, lambda _: self._again(number))
        return error

    def _again(self, number: int) -> None:
        if signal.getsignal(number) == signal.SIG_DFL:  # nobody has taken over meanwhile
            signal.signal(number, self.handle)
        # Not here, where an exception would be dropped again.
        timer = threading.Timer(_AGAIN_SECONDS, self._send, (number,))
        self._to_send.append((number, timer))
        timer.start()

    def _send(self, number: int) -> None:
        self._to_send.clear()
        os.kill(os.getpid(), number)

    def signalled(self) -> SignalledError | None:
        """The error that is under way, or one for a signal that is to be sent again; None without any.

        What comes in the place of one that was dropped, an import's error, may be here before the signal.
        """
        alive = self._error and self._error()
        return alive or next((SignalledError(number) for number, _ in self._to_send), None)

    def forget(self) -> None:
        """Send nothing again any more."""
        self._error = None  # a reference that is gone itself calls nobody
        for _, timer in self._to_send:
            timer.cancel()


@contextmanager
def _silent_when_dropped() -> Iterator[None]:
    """Have nothing printed of a SignalledError that Python drops, or that C code does: it comes again."""
    unraisable_hook, uncaught_hook = sys.unraisablehook, sys.excepthook

    def drop(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, SignalledError):
            unraisable_hook(unraisable)

    def forget(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # PyErr_Print, as numpy calls it when its import fails. It also keeps the error, which has to die.
        if isinstance(error, SignalledError):
            for name in ("last_exc", "last_type", "last_value", "last_traceback"):
                vars(sys).pop(name, None)
        else:
            uncaught_hook(kind, error, trace)

    sys.unraisablehook, sys.excepthook = drop, forget
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = unraisable_hook, uncaught_hook
