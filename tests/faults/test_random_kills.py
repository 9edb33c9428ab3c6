"""F3: kill -9 at random times: the driver, one of its workers, or all of them at once."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
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
    of_session,
    orphans,
    parts,
    stamps,
    wait_for,
)

NUM_KILLS = 200 if WANTS_ALL else 6
WORKERS = ("glm4v-decoder", "glm4v-reader", "glm4v-replica")
SLOW = "max_batch_size: 4, echo_seconds: 0.05"


def kill(process: subprocess.Popen[str], whom: str, rng: random.Random) -> None:
    """Kill *whom*, as far as it still lives."""
    with suppress(ProcessLookupError):
        if whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif whom == "driver":
            os.kill(process.pid, signal.SIGKILL)
        elif workers := [pid for pid, name in of_session(process.pid) if name in WORKERS]:
            os.kill(rng.choice(workers), signal.SIGKILL)


def violations(case: Case, whom: str, rng: random.Random) -> Iterator[str]:
    """Start the job, kill *whom* at a random moment, and look at what that leaves."""
    before = stamps(case.out)
    process = case.start()
    # From the first instructions on, or a while after some part has come to stand.
    more = rng.randrange(4)
    if more:
        wait_for(process, lambda: len(parts(case.out)) >= len(before) + more)
    time.sleep(rng.random() * (0.1 if more else 1.0))
    kill(process, whom, rng)
    if whom == "worker":
        said, _ = process.communicate(timeout=120)
        yield from harm_after_finish(case, process.returncode, said)
    else:
        process.communicate(timeout=120)
    yield from harm(case)
    # I3, I8: what stood stays as it was.
    if not before.items() <= stamps(case.out).items():
        yield "a part that stood before the kill is gone or changed"
    if left := orphans(process.pid):
        yield f"processes outlive the run: {left}"


@pytest.mark.parametrize("replicas", [0, 2])
def test_random_kills_lose_nothing_and_double_nothing(
    tmp_path: Path, make_source: MakeSource, judge: Judge, replicas: int
) -> None:
    case = make_case(tmp_path, make_source, f"{SLOW}, echo_replicas: {replicas}")
    rng = random.Random(5 + replicas)
    found: list[str] = []

    for number in range(NUM_KILLS // 2):
        whom = ("driver", "worker", "group")[number % 3]
        found += [f"kill {number} of {whom}: {each}" for each in violations(case, whom, rng)]
        if len(parts(case.out)) >= 12 or number == NUM_KILLS // 2 - 1:
            # I5: the end of any schedule of crashes is the crash-free result.
            found += [f"after kill {number}: {each}" for each in harm_after_finish(case, *case.run())]
            shutil.rmtree(case.out)

    judge(f"F3 random kills, {replicas} replicas", NUM_KILLS // 2, found)
