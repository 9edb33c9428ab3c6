"""Items taken ahead of their use: in order, not too many, and with whatever ended them."""

import threading
from collections.abc import Iterator

import pytest

from glm4v_batch.intake import Intake


def all_of(intake: Intake[int, str]) -> list[str]:
    taken = []
    while (item := intake.next(wait=True)) is not None:
        taken.append(item)
    return taken


def test_items_come_in_their_order_and_made_into_what_was_asked() -> None:
    with Intake(range(50), str, most_ahead=3) as intake:
        assert all_of(intake) == [str(number) for number in range(50)]
        assert intake.is_ended
        assert intake.next(wait=True) is None


def test_nothing_ready_is_told_without_waiting() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait()
        yield 1

    with Intake(items(), str, most_ahead=3) as intake:
        before = intake.next(wait=False)
        gate.set()
        after = intake.next(wait=True)

    assert (before, after) == (None, "1")


def test_no_more_is_taken_than_may_be_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Intake(items(), str, most_ahead=2) as intake:
        intake.next(wait=True)
        # One given out, two ready, one that waits to be.
        assert len(taken) <= 4


def test_what_stops_the_items_reaches_whoever_takes_them() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the pipe is gone")

    with Intake(items(), str, most_ahead=5) as intake:
        assert intake.next(wait=True) == "1"
        with pytest.raises(OSError, match="the pipe is gone"):
            intake.next(wait=True)


def test_leaving_early_waits_for_nobody() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        gate.wait()
        yield 2

    with Intake(items(), str, most_ahead=1) as intake:
        intake.next(wait=True)
    gate.set()

    assert intake.is_ended is False
