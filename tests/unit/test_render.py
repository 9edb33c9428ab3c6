"""What a run says at its end."""

import signal
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from glm4v_batch.asked import EVERYTHING, Asked
from glm4v_batch.executor import Outcome, run
from glm4v_batch.failure_watch import TooManyFailed
from glm4v_batch.job import Job, read_job
from glm4v_batch.plan import open_job
from glm4v_batch.render import outcome_as_text
from glm4v_batch.stopping import Interrupted, OutOfTime, Reason
from tests.conftest import MakeSource
from tests.e2e.command import write_job

AGAIN = Asked(retry=frozenset())


@pytest.fixture
def job(tmp_path: Path, make_source: MakeSource) -> Job:
    source = make_source(12, broken=(1, 4, 7, 10))
    return read_job(write_job(tmp_path / "job.yaml", source, tmp_path / "out"))


def finish(job: Job, asked: Asked = EVERYTHING) -> Outcome:
    *_, outcome = run(open_job(job), asked)
    assert isinstance(outcome, Outcome)
    return outcome


def stopped(outcome: Outcome, reason: Reason, num_committed: int) -> Outcome:
    """*outcome* as it would be, had *reason* ended the run after *num_committed* rows."""
    rows = {**outcome.report["rows"], "committed": num_committed}
    return replace(outcome, reason=reason, report={**outcome.report, "rows": rows})


REASONS: list[tuple[Reason, str]] = [
    (Interrupted(signal.SIGTERM), "Interrupted."),
    (OutOfTime(datetime(2020, 1, 1, tzinfo=UTC)), "Out of time: "),
    (TooManyFailed(3, 3, Counter(image_format=3)), "Stopped: 3 of the last 3 records failed "),
]


@pytest.mark.parametrize(("reason", "said"), REASONS)
def test_a_retry_that_ends_early_says_how_many_failed_rows_were_done_again(
    job: Job, reason: Reason, said: str
) -> None:
    finish(job)

    first, *_, last = outcome_as_text(stopped(finish(job, AGAIN), reason, 3), "RUN").splitlines()

    assert first.startswith(said)
    assert first.endswith(f" 3 of 4 failed rows in {job.output.path} were done again.")
    assert last == "Resume with: RUN"


@pytest.mark.parametrize(("reason", "said"), REASONS)
def test_a_run_that_ends_early_says_how_many_rows_are_committed(job: Job, reason: Reason, said: str) -> None:
    first, *_, last = outcome_as_text(stopped(finish(job), reason, 3), "RUN").splitlines()

    assert first.startswith(said)
    assert first.endswith(f" 3 of 12 rows are committed in {job.output.path}.")
    assert last == "Resume with: RUN"


def test_a_second_night_tells_its_own_failed_rows_from_those_of_the_folder(job: Job) -> None:
    finish(job, Asked(limit=9))

    first, *_, last = outcome_as_text(finish(job), "RUN").splitlines()[:3]

    assert first.startswith("3 rows committed to ")
    assert first.endswith(" rows/s, 1 of them failed")
    assert last == (
        f"{job.output.path} holds 12 rows; 4 of the folder's rows failed: see their error_message"
    )


def test_a_retry_that_comes_to_its_end_says_what_became_of_the_failed_rows(job: Job) -> None:
    finish(job)

    first, *_ = outcome_as_text(finish(job, AGAIN), "RUN").splitlines()

    assert first == f"4 failed rows of {job.output.path} done again: 0 ok, 4 failed again"
