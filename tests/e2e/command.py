"""Run the command as a user does, in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
