"""Child processes: their helpers outlive a terminal's signals, and nothing of an ended one is left."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from glm4v_batch.child import Child
from glm4v_batch.errors import PlacementError
from tests.conftest import MakeSource
from tests.e2e.command import ROOT, write_job

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


def test_a_fork_server_killed_while_it_is_asked_costs_no_child() -> None:
    Child(print, name="child").end(grace_seconds=30)
    server = fork_server()
    os.kill(server, signal.SIGSTOP)  # it takes the request in, and answers nothing
    threading.Timer(0.5, os.kill, (server, signal.SIGKILL)).start()

    child = Child(say_hello, name="child")

    assert child.pipe.recv() == "hello"
    child.end(grace_seconds=30)
    assert fork_server() != server


SCARCE = """
import os, resource
from glm4v_batch.child import Child
from glm4v_batch.errors import PlacementError

first_free = os.dup(0)
os.close(first_free)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for num_files in range(6):  # the pipe takes two, the tracker's pipe two more, and what waits for its exec too
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + num_files, most))
    try:
        Child(print, name="child")
    except PlacementError as error:
        print(error)
"""


def test_a_system_without_open_files_for_the_helpers_of_multiprocessing_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", SCARCE], cwd=ROOT, capture_output=True, text=True)

    refusal = "The process child cannot be started: Too many open files."
    assert (done.stdout.splitlines(), done.stderr) == ([refusal] * 6, "")


def test_fork_servers_that_end_again_and_again_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise EOFError  # as multiprocessing does then

    monkeypatch.setattr(ForkServerProcess, "start", start)
    gc.collect()  # or what earlier tests have left may be closed meanwhile
    num_open = len([*Path("/proc/self/fd").iterdir()])

    with pytest.raises(PlacementError, match=r"glm4v-decoder .* was killed or ended 5 times") as refusal:
        Child(print, name="glm4v-decoder")

    assert "dmesg" in refusal.value.hint
    assert sys.executable in refusal.value.hint
    assert len([*Path("/proc/self/fd").iterdir()]) == num_open


def test_what_is_still_being_written_to_an_ended_child_goes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(print, name="child")
    child.pipe.poll(None)  # until it has ended
    number = child.pipe.fileno()
    is_writing, is_resumed, is_written = threading.Event(), threading.Event(), threading.Event()

    def write_late(message: bytes) -> None:
        is_writing.set()
        is_resumed.wait(1)  # the kernel may let a thread wait for as long, just before it writes
        try:
            os.write(number, message)
        finally:
            is_written.set()

    monkeypatch.setattr(child.pipe, "send_bytes", write_late)
    child.post(b"for this child")
    is_writing.wait()

    child.end(grace_seconds=30)

    with (tmp_path / "next").open("wb") as opened_next:
        os.dup2(opened_next.fileno(), number)
        is_resumed.set()
        is_written.wait()
    os.closerange(number, number + 1)  # which may be closed already
    assert (tmp_path / "next").read_bytes() == b""


def test_ending_a_child_ends_its_writing_though_others_hold_the_pipe() -> None:
    before = {*threading.enumerate()}
    child = Child(leave_a_holder, name="child")
    holder = child.pipe.recv()
    child.post(bytes(16 * 1024**2))  # more than a pipe takes

    child.end(grace_seconds=30)

    is_held = any(Path(f"/proc/{holder}/fd").iterdir())
    os.kill(holder, signal.SIGKILL)
    assert is_held
    assert {*threading.enumerate()} <= before


UNGUARDED = """
import sys
from pathlib import Path
from glm4v_batch.executor import run
from glm4v_batch.job import read_job
from glm4v_batch.plan import open_job

events = run(open_job(read_job(Path(sys.argv[1]))))
print([*events][-1].exit_code)
"""


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_a_program_without_a_guarded_main_module_is_told_so(
    tmp_path: Path, make_source: MakeSource, kind: str
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    source = f"source: {{kind: dataset, path: {tmp_path / 'source'}, id: id}}"
    if kind == "dataset":
        job.write_text(re.sub("source: .*", source, job.read_text()))
    program = tmp_path / "program.py"
    guard = 'if __name__ == "__main__":'
    program.write_text(UNGUARDED)
    guarded = tmp_path / "guarded.py"
    guarded.write_text(f"{guard}\n" + "".join(f"    {line}\n" for line in UNGUARDED.splitlines()))

    refused, done = (
        subprocess.run([sys.executable, each, job], cwd=ROOT, capture_output=True, text=True)
        for each in (program, guarded)
    )

    assert refused.returncode == 1
    assert refused.stderr.count("Traceback") == 1, refused.stderr
    assert refused.stderr.splitlines()[-1].endswith(f"put what starts the run below `{guard}`.")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def fork_server() -> int:
    """The process that starts the children of this one."""
    (found,) = (
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"multiprocessing.forkserver" in read(path) and parent_of(path.parent) == os.getpid()
    )
    return found


def read(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def parent_of(process: Path) -> int:
    return int(read(process / "stat").rpartition(b")")[2].split()[1])


def say_hello(pipe: Connection) -> None:
    pipe.send("hello")


def leave_a_holder(pipe: Connection) -> None:
    holder = subprocess.Popen(["sleep", "60"], pass_fds=[pipe.fileno()])
    pipe.send(holder.pid)
