"""Real runs to be killed and interrupted: how they are started, found, and judged by what they leave."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.conftest import MakeSource
from tests.e2e.command import ROOT, command, write_job

_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    """A job file, its output, and the rows that an undisturbed run of it leaves."""

    job: Path
    out: Path
    rows: tuple[dict[str, Any], ...]
    code: int

    def start(self, *options: str, **popen: Any) -> subprocess.Popen[str]:
        """Start the job in a session of its own."""
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **popen}
        return subprocess.Popen(
            command("run", self.job, *options),
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **streams,
        )

    def run(self, *options: str) -> tuple[int, str]:
        """Run the job to its end: the exit code, and all that was said."""
        with self.start(*options) as process:
            said, _ = process.communicate(timeout=_PATIENCE_SECONDS)
        return process.returncode, said


def make_case(folder: Path, make_source: MakeSource, batching: str, *, name: str = "case") -> Case:
    """Sixty rows in two files, two of them broken, four to a part; and how that ends undisturbed."""
    source = make_source(60, shards=2, broken=(7, 44), name=f"source of {name}")
    lines = [f"batching: {{engine: echo, {batching}}}"]
    whole = write_job(folder / f"{name}-whole.yaml", source, folder / f"{name}-whole", rows_per_part=4)
    code, said = Case(whole, folder / f"{name}-whole", (), 3).run()
    assert code == 3, said
    job = write_job(folder / f"{name}.yaml", source, folder / name, rows_per_part=4, extra=lines)
    return Case(job, folder / name, tuple(rows_of(folder / f"{name}-whole")), code)


def parts(out: Path) -> list[Path]:
    """The parts that stand in *out*."""
    return sorted(out.glob("part-*.parquet"))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows of all parts by their place in the source, read with no code of ours."""
    rows = [row for part in parts(out) for row in pq.ParquetFile(part).read().to_pylist()]
    return sorted(rows, key=lambda row: (row["source"], row["row"]))


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a part was touched."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts(out)}


def harm(case: Case) -> Iterator[str]:
    """What is wrong with the parts at some instant: unreadable, doubled, or other rows (I1, I2)."""
    try:
        rows = rows_of(case.out)
    except (OSError, ValueError) as error:  # Arrow's errors are these
        yield f"a part cannot be read: {error}"
        return
    places = [(row["source"], row["row"]) for row in rows]
    if len(places) != len(set(places)):
        yield "a row stands in two parts"
    elif any(row not in case.rows for row in rows):
        yield "a row is not what it would have been without the trouble"


def harm_after_finish(case: Case, code: int, said: str) -> Iterator[str]:
    """What is wrong with the folder after a run that ended by itself (I2, I5, I11, I13)."""
    if code != case.code:
        yield f"exit {code} instead of {case.code}: {said}"
        return
    if tuple(rows_of(case.out)) != case.rows:
        yield "the rows are not those of an undisturbed run"
    leftovers = [path.name for path in (case.out / ".glm4v-batch" / "tmp").iterdir()]
    if leftovers:
        yield f"left over: {leftovers}"


def of_session(session: int) -> list[tuple[int, str]]:
    """The living processes of *session*, which has the number of the run that began it, with their names."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its_session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append((int(path.name), (path / "comm").read_text().strip()))
    return found


def orphans(session: int) -> list[tuple[int, str]]:
    """The processes of *session* that do not end by themselves."""
    deadline = time.monotonic() + 30
    while (left := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def wait_for(process: subprocess.Popen[str], is_so: Callable[[], object]) -> bool:
    """Wait until *is_so*; whether that came before *process* ended."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_so():
        if process.poll() is not None:
            return bool(is_so())
        assert time.monotonic() < deadline, "the state that the test waits for did not come"
        time.sleep(0.005)
    return True
