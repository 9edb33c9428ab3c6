"""F8: two runs on one folder: one works, the other refuses; without the lock there is no duplicate either."""

import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.conftest import MakeSource
from tests.faults.conftest import Judge
from tests.faults.harness import WANTS_ALL
from tests.faults.runs import (
    Case,
    harm,
    harm_after_finish,
    make_case,
    wait_for,
)

NUM_PAIRS = 100 if WANTS_ALL else 4
NUM_STOPPED = 10 if WANTS_ALL else 2
NUM_UNLOCKED = 20 if WANTS_ALL else 2
HELD = 75


@pytest.fixture
def case(tmp_path: Path, make_source: MakeSource) -> Case:
    return make_case(tmp_path, make_source, "max_batch_size: 4, echo_seconds: 0.02")


def test_of_two_commands_started_together_one_works_and_one_refuses(case: Case, judge: Judge) -> None:
    found: list[str] = []
    for number in range(NUM_PAIRS):
        pair = [case.start(), case.start()]
        ended = [(process.communicate(timeout=120)[0], process.returncode) for process in pair]
        codes = sorted(code for _, code in ended)
        # Both end well where the one had finished before the other came to the lock.
        if codes not in ([case.code, HELD], [case.code, case.code]):
            found.append(f"pair {number} ended with {codes}: {ended}")
        refusals = [said for said, code in ended if code == HELD]
        owners = [str(process.pid) for process in pair]
        if any(
            "is held by another run" not in said or not any(o in said for o in owners) for said in refusals
        ):
            found.append(f"pair {number}: the refusal names no owner: {refusals}")
        found += [f"pair {number}: {each}" for each in harm_after_finish(case, case.code, "")]
        shutil.rmtree(case.out)

    judge("F8 two runs started together", NUM_PAIRS, found)


def test_a_stopped_run_still_holds_its_folder_and_goes_on_when_continued(
    tmp_path: Path, make_source: MakeSource, judge: Judge
) -> None:
    case = make_case(tmp_path, make_source, "max_batch_size: 4, echo_seconds: 0.2")
    found: list[str] = []
    seconds: list[float] = []
    for number in range(NUM_STOPPED):
        first = case.start()
        wait_for(first, lambda: list(case.out.glob("part-*")))
        first.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code, said = case.run()
        seconds.append(time.monotonic() - began)
        first.send_signal(signal.SIGCONT)
        whole, _ = first.communicate(timeout=120)
        if code != HELD or f"process {first.pid}" not in said:
            found.append(f"{number}: the second run ended with {code}: {said}")
        found += [f"{number}: {each}" for each in harm_after_finish(case, first.returncode, whole)]
        shutil.rmtree(case.out)

    what = f"F8 one stopped, another started (refused after {statistics.median(seconds):.2f} s, median)"
    judge(what, NUM_STOPPED, found)


def test_two_runs_without_a_lock_leave_no_duplicate(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    # As on a network file system that grants every lock.
    (tmp_path / "unlocked").mkdir()
    (tmp_path / "unlocked" / "sitecustomize.py").write_text(
        "import fcntl\nfcntl.flock = lambda file, how: None\n"
    )
    found: list[str] = []
    for number in range(NUM_UNLOCKED):
        with monkeypatch.context() as unlocked:
            path = os.environ.get("PYTHONPATH", "")
            unlocked.setenv("PYTHONPATH", f"{tmp_path / 'unlocked'}{os.pathsep}{path}")
            pair = [case.start(), case.start()]
            codes = [(process.communicate(timeout=120), process.returncode)[1] for process in pair]
        if HELD in codes:
            found.append(f"pair {number}: the lock was not off: {codes}")
        found += [f"pair {number}: {each}" for each in harm(case)]
        found += [f"pair {number}, then alone: {each}" for each in harm_after_finish(case, *case.run())]
        shutil.rmtree(case.out)

    judge("F8 two runs without a lock", NUM_UNLOCKED, found)
