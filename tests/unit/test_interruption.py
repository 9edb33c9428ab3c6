"""A signal ends what is being prepared, even where Python drops what its handler raises."""

import os
import signal
import threading
import weakref

import pytest

from glm4v_batch.interruption import SignalledError, ended_by_signals


class Referred:
    pass


def wait_for_ever(signal_number: int | None = None) -> None:
    if signal_number is not None:
        os.kill(os.getpid(), signal_number)
    threading.Event().wait(60)
    raise AssertionError("no signal has ended this")


def test_a_signal_ends_what_is_done_inside() -> None:
    with pytest.raises(SignalledError) as caught, ended_by_signals():
        wait_for_ever(signal.SIGTERM)

    assert caught.value.signal_number == signal.SIGTERM


def test_a_signal_whose_error_python_drops_in_a_callback_ends_it_all_the_same_and_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wait_after_callback() -> None:
        referred = Referred()
        _kept = weakref.ref(referred, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del referred
        wait_for_ever()

    with pytest.raises(SignalledError) as caught, ended_by_signals():
        wait_after_callback()

    assert caught.value.signal_number == signal.SIGTERM
    assert capsys.readouterr().err == ""


def test_handlers_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    with pytest.raises(SignalledError), ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    with ended_by_signals():
        pass

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
