"""Stretches of the KV pool: none overlaps another, and what comes back is whole again."""

from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.segments import Segments


def test_the_first_hole_that_is_long_enough_is_taken() -> None:
    segments = Segments(10)
    assert [segments.take(n) for n in (3, 3, 3)] == [0, 3, 6]

    segments.give_back(3, 3)

    assert segments.take(4) is None
    assert segments.take(2) == 3
    assert segments.take(1) == 5
    assert segments.take(1) == 9


def test_neighbours_that_come_back_make_one_stretch() -> None:
    segments = Segments(9)
    for _ in range(3):
        segments.take(3)

    for start in (0, 6, 3):
        segments.give_back(start, 3)

    assert segments.take(9) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_what_is_handed_out_never_overlaps_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    segments, held = Segments(100), []

    for takes, number in steps:
        if takes and (start := segments.take(number)) is not None:
            held.append(range(start, start + number))
        elif not takes and held:
            stretch = held.pop(number % len(held))
            segments.give_back(stretch.start, len(stretch))

    places = [place for stretch in held for place in stretch]
    assert len(places) == len(set(places))
    assert all(0 <= place < 100 for place in places)
    for stretch in held:
        segments.give_back(stretch.start, len(stretch))
    assert segments.take(100) == 0
