"""Child processes: what a terminal sends to the whole group reaches none of their helpers."""

import signal
import subprocess
import sys

import pytest

from tests.tiny import ROOT

TWICE = """
import os, signal, sys, time
from glm4v_batch.child import Child

def child():
    made = Child(print, name="child")  # ends at once: what outlives it is the fork server and the tracker
    made.end(grace_seconds=30)

signal.signal(int(sys.argv[1]), lambda *_: None)
child()
os.killpg(0, int(sys.argv[1]))
time.sleep(0.5)  # long enough to die of it
child()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_leaves_the_helpers_of_multiprocessing_alive(number: signal.Signals) -> None:
    script = [sys.executable, "-W", "error", "-c", TWICE, f"{number:d}"]

    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, start_new_session=True)

    assert (done.returncode, done.stderr) == (0, "")
