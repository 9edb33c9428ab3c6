"""A signal ends what is being prepared, even where Python drops what its handler raises."""

import os
import signal
import sys
import threading
import time
import weakref
from contextlib import nullcontext, suppress

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


def import_an_extension(signal_number: int) -> None:
    """Meet a signal where numpy's `import_array` does: it prints the error, drops it and raises another."""
    try:
        wait_for_ever(signal_number)
    except SignalledError as error:
        sys.last_value = error
        sys.excepthook(SignalledError, error, error.__traceback__)
    raise ImportError("numpy.core.multiarray failed to import")


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_a_signal_whose_error_c_code_prints_ends_it_all_the_same_and_prints_nothing(
    is_swallowed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_several() -> None:
        with suppress(ImportError) if is_swallowed else nullcontext():
            import_an_extension(signal.SIGINT)
        wait_for_ever()

    with pytest.raises(SignalledError) as caught, ended_by_signals():
        import_several()

    assert caught.value.signal_number == signal.SIGINT
    assert capsys.readouterr().err == ""
    assert not hasattr(sys, "last_value")


def test_nothing_is_sent_again_once_it_has_ended() -> None:
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: numbers.append(number))
    try:
        with pytest.raises(SignalledError), ended_by_signals():
            import_an_extension(signal.SIGTERM)
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert numbers == []


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
