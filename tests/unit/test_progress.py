"""What a run shows while it goes."""

import io
from pathlib import Path

import pytest

from glm4v_batch import progress
from glm4v_batch.executor import Event, run
from glm4v_batch.job import read_job
from glm4v_batch.plan import open_job
from glm4v_batch.progress import Progress
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
