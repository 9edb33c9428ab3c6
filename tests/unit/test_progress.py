"""What a run shows while it goes."""

import io
from pathlib import Path

import pytest

from glm4v_batch import progress
from glm4v_batch.devices import DeviceUse
from glm4v_batch.executor import DevicesSeen, Event, run
from glm4v_batch.job import read_job
from glm4v_batch.plan import open_job
from glm4v_batch.progress import Progress
from glm4v_batch.types import ReplicaLost, ReplicaReady
from tests.conftest import MakeSource
from tests.e2e.command import write_job


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(tmp_path: Path, make_source: MakeSource) -> list[Event]:
    job = write_job(tmp_path / "job.yaml", make_source(50, broken=(4,)), tmp_path / "out")
    return list(run(open_job(read_job(job))))


def test_a_terminal_gets_a_bar_with_the_failures(tmp_path: Path, make_source: MakeSource) -> None:
    stream = Terminal()

    with Progress(stream) as shown:
        outcome = shown.follow(events(tmp_path, make_source))

    assert "50/50" in stream.getvalue()
    assert "1 failed" in stream.getvalue()
    assert outcome.num_failed == 1


def test_elsewhere_a_line_comes_now_and_then(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    stream = io.StringIO()

    with Progress(stream) as shown:
        shown.follow(events(tmp_path, make_source))

    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("test: 50 rows to do, 0 committed in ")
    assert any(line.startswith("50 of 50 rows, 1 failed, ") for line in lines)
    assert "\r" not in stream.getvalue()


def test_the_bar_shows_what_each_card_holds_and_how_busy_it_is(
    tmp_path: Path, make_source: MakeSource
) -> None:
    stream = Terminal()
    plan, *others = events(tmp_path, make_source)
    seen = DevicesSeen((DeviceUse(0, 22 << 30, 24 << 30, 0.97), DeviceUse(2, 3 << 29, 24 << 30, None)))

    with Progress(stream) as shown:
        shown.follow([plan, seen, *others])

    assert "GPU 0 22.0/24 GiB 97%, GPU 2 1.5/24 GiB" in stream.getvalue()


def test_replicas_that_come_and_go_are_told(tmp_path: Path, make_source: MakeSource) -> None:
    stream = io.StringIO()
    plan, *others = events(tmp_path, make_source)
    ready, lost = ReplicaReady(0, 12.5, (19 << 30,)), ReplicaLost(1, "its process died: signal 9", 7)

    with Progress(stream) as shown:
        shown.follow([plan, ready, lost, *others])

    assert "replica 0 ready after 12.5 s with 19.00 GiB\n" in stream.getvalue()
    assert "replica 1 lost, 7 requests to do again: its process died: signal 9\n" in stream.getvalue()
