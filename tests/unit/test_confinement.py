"""A confined process has no secrets, writes nothing and ends when it works for too long."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SECRET = "hunter2"


def confined(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run *program*, with a secret in its environment, in a process that may confine itself."""
    imports = "import os, sys, time\nfrom pathlib import Path\nfrom glm4v_batch.confinement import *\n"
    return subprocess.run(
        [sys.executable, "-c", imports + program],
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET},
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def test_the_environment_is_forgotten_also_where_the_kernel_shows_it(tmp_path: Path) -> None:
    show = "print(dict(os.environ), Path('/proc/self/environ').read_bytes())"

    before, after = confined(show, tmp_path), confined(f"forget_environment()\n{show}", tmp_path)

    assert before.stdout.count(SECRET) == 2
    assert after.returncode == 0, after.stderr
    assert SECRET not in after.stdout
    assert "PATH" in after.stdout


@pytest.mark.parametrize(("soft_gib", "hard_gib"), [(1, 1), (1, 4096), (4096, 4096)])
def test_a_limit_on_memory_keeps_to_one_that_was_set_from_outside(
    tmp_path: Path, soft_gib: int, hard_gib: int
) -> None:
    least, most = ("2 << 30", "4 << 30") if soft_gib > 1 else ("1 << 30", "1 << 30")
    program = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({soft_gib} << 30, {hard_gib} << 30))\n"
        "limit_memory(2 << 30)\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        f"assert {least} <= soft <= {most} and hard == {hard_gib} << 30\n"
        "bytearray(3 << 30)\n"
    )

    assert "MemoryError" in confined(program, tmp_path).stderr


def test_nothing_can_be_written_to_a_file(tmp_path: Path) -> None:
    done = confined("forbid_files()\nPath('file').write_text('x')", tmp_path)

    assert "File too large" in done.stderr
    assert (tmp_path / "file").read_text() == ""


def test_what_libraries_print_goes_nowhere(tmp_path: Path) -> None:
    done = confined("be_silent()\nos.write(1, b'text')\nos.write(2, b'text')", tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_endless_loop_ends_by_its_own_signal(tmp_path: Path) -> None:
    done = confined("allow_cpu(0.5)\nwhile True: pass", tmp_path)

    assert done.returncode == -signal.SIGXCPU


def test_waiting_costs_no_processor_time_and_each_allowance_starts_anew(tmp_path: Path) -> None:
    work = "began = time.process_time()\nwhile time.process_time() < began + 0.6: pass\n"
    done = confined(
        f"for _ in range(3):\n    allow_cpu(1)\n    time.sleep(0.5)\n    exec({work!r})", tmp_path
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much address space is in use")
def test_memory_grows_by_no_more_than_allowed(tmp_path: Path) -> None:
    within = confined("limit_memory(300 << 20)\nbytearray(100 << 20)", tmp_path)
    beyond = confined("limit_memory(300 << 20)\nbytearray(400 << 20)", tmp_path)

    assert within.returncode == 0
    assert "MemoryError" in beyond.stderr
