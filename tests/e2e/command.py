"""Run the command as a user does, in a process of its own."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "data" / "tiny-glm4v"


def command(*arguments: object) -> list[str]:
    """The command line that runs glm4v-batch with *arguments*."""
    return [sys.executable, "-W", "error", "-m", "glm4v_batch.cli", *map(str, arguments)]


def run_command(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run glm4v-batch with *arguments* and wait for it."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
    )


# What a run takes to be continued without its batches' waiting: how batches are made is no part of a job's
# identity.
AT_ONCE = ("--set", "batching.echo_seconds=0")


def wait_until(process: subprocess.Popen[Any], is_so: Callable[[], object]) -> None:
    """Wait until *is_so*, which has to come before *process* ends."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.01)


def num_batches(output: Path) -> int:
    """How many batches of the echo engine are done, with all that was to be made durable for them."""
    written = output / ".glm4v-batch" / "batches.jsonl"
    return written.read_bytes().count(b"\n") if written.exists() else 0


def write_job(
    path: Path, source: Path, output: Path, *, extra: Sequence[str] = (), rows_per_part: int = 20
) -> Path:
    """A job file on the echo engine; *extra* are lines to add."""
    path.write_text(
        "\n".join(
            [
                "name: test",
                f"source: {{kind: parquet, path: {source}/*.parquet, id: id}}",
                'prompt: {user: "Describe {title}."}',
                f"model: {{name: {MODEL}}}",
                f"output: {{path: {output}, rows_per_part: {rows_per_part}, columns: [title]}}",
                *(extra or ["batching: {engine: echo}"]),
                "",
            ]
        )
    )
    return path
