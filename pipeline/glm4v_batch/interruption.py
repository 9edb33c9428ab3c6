"""Signals that ask a run to end. While it is only being prepared they end it at once, as Ctrl-C does."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run to end."""


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
        raise SignalledError(number)

    previous = {number: signal.signal(number, end) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
