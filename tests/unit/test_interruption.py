"""A signal ends what is being prepared, even where Python drops what its handler raises."""

import os
import signal
import threading
import weakref
from contextlib import suppress

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


@pytest.mark.usefixtures("heeded_hangup")
def test_a_signal_whose_error_is_swallowed_ends_it_all_the_same() -> None:
    def import_something_that_swallows_errors() -> None:
        with suppress(BaseException):
            wait_for_ever(signal.SIGHUP)
        wait_for_ever()

    with pytest.raises(SignalledError) as caught, ended_by_signals():
        import_something_that_swallows_errors()

    assert caught.value.signal_number == signal.SIGHUP


def test_a_signal_whose_error_comes_wrapped_in_another_ends_it_all_the_same() -> None:
    class WaitsForEver:
        def __set_name__(self, _owner: type, _name: str) -> None:
            wait_for_ever(signal.SIGTERM)

    with pytest.raises(SignalledError) as caught, ended_by_signals():
        type("Owner", (), {"attribute": WaitsForEver()})

    assert caught.value.signal_number == signal.SIGTERM


def test_an_error_that_has_nothing_to_do_with_signals_stays_itself() -> None:
    with pytest.raises(KeyError), ended_by_signals():
        raise KeyError


def test_handlers_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    with pytest.raises(SignalledError), ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    with ended_by_signals():
        pass

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
