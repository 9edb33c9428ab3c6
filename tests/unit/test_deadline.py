"""A time to be done by, and whether more can still be done."""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from glm4v_batch.deadline import Deadline, read_deadline, resume_command
from glm4v_batch.errors import JobError


@pytest.fixture(autouse=True)
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A zone that changes its clocks: at 3:00 on 2026-03-29 and at 3:00 on 2026-10-25.
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone()


@pytest.mark.parametrize(
    ("text", "now", "meant"),
    [
        ("06:00", "2026-11-22T05:59", "2026-11-22T06:00"),
        ("06:00", "2026-11-22T06:00", "2026-11-23T06:00"),
        ("6:00", "2026-11-22T23:30", "2026-11-23T06:00"),
        ("06:00:30", "2026-11-22T06:00:10", "2026-11-22T06:00:30"),
        ("2026-11-24T06:00", "2026-11-22T23:30", "2026-11-24T06:00"),
        ("2026-11-24 06:00", "2026-11-22T23:30", "2026-11-24T06:00"),
        ("2026-11-24T06:00+00:00", "2026-11-22T23:30", "2026-11-24T07:00"),
        ("2020-01-01", "2026-11-22T23:30", "2020-01-01T00:00"),
    ],
)
def test_a_clock_time_is_its_next_occurrence_and_a_date_stands_as_it_is(
    text: str, now: str, meant: str
) -> None:
    assert read_deadline(text, local(now)) == local(meant)


@pytest.mark.parametrize(
    ("evening", "hours"),
    [("2026-03-28T22:00", 7), ("2026-10-24T22:00", 9), ("2026-11-22T22:00", 8)],
)
def test_a_night_in_which_the_clocks_change_is_shorter_or_longer(evening: str, hours: int) -> None:
    now = local(evening)

    assert read_deadline("06:00", now) - now == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "soon", "25:00", "06:60", "2026-13-01T06:00", "9999999"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(JobError, match="is no time") as refused:
        read_deadline(text)

    assert "06:00" in refused.value.hint


class Clock:
    def __init__(self) -> None:
        self.seconds = local("2026-11-22T22:00").timestamp()

    def __call__(self) -> float:
        return self.seconds


def test_chunks_are_admitted_while_all_in_hand_can_be_done_at_the_pace_so_far() -> None:
    clock = Clock()
    deadline = Deadline(local("2026-11-22T22:02"), clock)
    assert deadline.admit(20)
    deadline.begin()
    clock.seconds += 20
    for _ in range(20):
        deadline.end_one()

    # 1 s a record, 100 s left: 60 records would take 75 s with what is allowed for, 20 more 100 s.
    assert deadline.admit(60)
    assert not deadline.admit(20)


def test_before_anything_is_measured_only_the_time_itself_refuses() -> None:
    clock = Clock()
    deadline = Deadline(local("2026-11-22T22:02"), clock)

    assert deadline.admit(1_000_000)
    clock.seconds += 120

    assert deadline.has_passed
    assert not deadline.admit(1)


def test_loading_a_model_does_not_count_as_pace() -> None:
    clock = Clock()
    deadline = Deadline(local("2026-11-22T23:00"), clock)
    deadline.admit(20)
    clock.seconds += 1800
    deadline.begin()
    clock.seconds += 20
    for _ in range(20):
        deadline.end_one()

    assert deadline.admit(1000)


@pytest.mark.parametrize(
    "until", [["--until", "06:00"], ["--until=06:00"], ["--until", "05:00", "--until=06:00"]]
)
def test_the_command_that_goes_on_leaves_out_a_time_that_has_passed(until: list[str]) -> None:
    now = datetime.now().astimezone()
    arguments = ["run", *until, "my job.yaml", "--limit", "5"]

    late = resume_command(arguments, now - timedelta(seconds=1))
    in_time = resume_command(arguments, now + timedelta(hours=1))

    assert late == "glm4v-batch run 'my job.yaml' --limit 5"
    assert in_time == f"glm4v-batch run {' '.join(until)} 'my job.yaml' --limit 5"
