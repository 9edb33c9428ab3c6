"""Many failures in a row mean that something broke."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.failure_codes import FailureCode
from glm4v_batch.failure_watch import FailureWatch, TooManyFailed
from glm4v_batch.job import LimitSettings
from glm4v_batch.types import Chunk
from tests.builders import completion, failure

CHUNK = Chunk("shard", 0, 10_000)


def verdicts(outcomes: list[bool], limits: LimitSettings) -> list[TooManyFailed | None]:
    watch = FailureWatch(limits)
    return [
        watch.add(failure(row, CHUNK) if failed else completion(row, CHUNK))
        for row, failed in enumerate(outcomes)
    ]


def first_at(outcomes: list[bool], limits: LimitSettings) -> int | None:
    """After how many records it fires."""
    return next((n for n, found in enumerate(verdicts(outcomes, limits), start=1) if found), None)


def test_it_fires_when_the_window_is_full_and_more_than_the_fraction_failed() -> None:
    limits = LimitSettings(failed_fraction=0.2, failed_window=100)

    assert first_at([True] * 20 + [False] * 80, limits) is None
    assert first_at([True] * 21 + [False] * 79, limits) == 100


def test_a_disk_that_breaks_late_is_noticed_within_the_window() -> None:
    assert first_at([False] * 5000 + [True] * 500, LimitSettings()) == 5201


def test_a_hundred_failures_and_nothing_else_are_enough() -> None:
    assert first_at([True] * 150, LimitSettings()) == 100
    assert first_at([True] * 99, LimitSettings()) is None
    assert first_at([False] + [True] * 149, LimitSettings()) is None


def test_null_is_off() -> None:
    assert first_at([True] * 5000, LimitSettings(failed_fraction=None)) is None


def test_the_verdict_counts_by_code_the_commonest_first() -> None:
    watch = FailureWatch(LimitSettings(failed_fraction=0.5, failed_window=10))
    codes: list[FailureCode] = ["image_missing" if row < 3 else "image_truncated" for row in range(10)]

    *_, found = [watch.add(failure(row, CHUNK, code)) for row, code in enumerate(codes)]

    assert found == TooManyFailed(10, 10, {"image_truncated": 7, "image_missing": 3})
    assert next(iter(found.codes)) == "image_truncated"


@given(
    st.lists(st.booleans(), max_size=300),
    st.integers(1, 90),
    st.floats(0, 1, exclude_max=True),
)
def test_it_fires_exactly_when_a_full_window_holds_too_many(
    outcomes: list[bool], window: int, fraction: float
) -> None:
    limits = LimitSettings(failed_fraction=fraction, failed_window=window)

    expected = [
        n >= window and sum(outcomes[n - window : n]) > fraction * window for n in range(1, len(outcomes) + 1)
    ]

    assert [found is not None for found in verdicts(outcomes, limits)] == expected


@pytest.mark.parametrize(("fraction", "window"), [(-0.1, 10), (1.5, 10), (0.5, 0)])
def test_limits_that_make_no_sense_are_refused(fraction: float, window: int) -> None:
    with pytest.raises(ValueError, match=r"than or equal"):
        LimitSettings(failed_fraction=fraction, failed_window=window)
