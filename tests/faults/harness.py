"""Run the real command over a folder where things go wrong on purpose, and judge what it leaves.

The trouble comes from `shim.c`, loaded into the driver: what it counts are the operations that change
the disk folder, so every test names its fault by a number and meets it at the same place each time.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import image_bytes
from tests.e2e.command import ROOT, command, write_job

WANTS_ALL = os.environ.get("FAULTS") == "all"
"""Whether to try every point, as `make faults` does, or a sample of them."""

DRIVER = [sys.executable, "-W", "error", "-m", "tests.faults.driver"]
_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Operation:
    """What the driver did to the disk, or said. *data* is what it wrote."""

    kind: str
    path: Path
    other: Path
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended."""

    code: int
    said: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A job and what a run of it comes to when nothing goes wrong."""

    folder: Path
    shim: Path
    package: Path = ROOT / "pipeline"
    rows: tuple[dict[str, Any], ...] = ()
    code: int = 0

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "undisturbed.log"

    def disk(self, name: str) -> Path:
        """A fresh folder, whose content is what goes wrong."""
        made = self.folder / name
        made.mkdir()
        return made


def is_part(path: Path) -> bool:
    """Whether *path* is a part by its name."""
    return path.name.startswith("part-") and path.name.endswith(".parquet")


def out(disk: Path) -> Path:
    """Where the job writes: two folders of its own making below the disk."""
    return disk / "deep" / "out"


def parts(disk: Path) -> list[Path]:
    return sorted(out(disk).glob("part-*.parquet"))


def make_scene(folder: Path, shim: Path) -> Scene:
    """Fifteen rows in two files, one of them broken; parts of four rows; and how that ends."""
    source = folder / "source"
    source.mkdir(parents=True)
    for shard, rows in enumerate((range(10), range(10, 15))):
        images = [b"not an image" if row == 6 else image_bytes(row, (28, 28)) for row in rows]
        texts = {"id": [f"id-{row}" for row in rows], "title": [f"title {row}" for row in rows]}
        pq.write_table(pa.table({**texts, "image": images}), source / f"shard-{shard}.parquet")
    return complete(Scene(folder, shim))


def complete(scene: Scene, prompt: str = "Describe {title}.") -> Scene:
    """*scene* with a job file, and with what an undisturbed run comes to."""
    batching = "batching: {engine: echo, max_batch_size: 4}"
    job = write_job(
        scene.job, scene.folder / "source", scene.folder / "nowhere", rows_per_part=4, extra=[batching]
    )
    job.write_text(job.read_text().replace("Describe {title}.", prompt))
    disk = scene.disk("undisturbed")
    finished = run(scene, disk, log=scene.log)
    assert finished.code in (0, 3), finished.said
    return replace(scene, rows=tuple(rows_of(disk)), code=finished.code)


def start(
    scene: Scene, disk: Path, do: str = "", log: Path | None = None, program: Sequence[str] | None = None
) -> subprocess.Popen[str]:
    """Start the job on *disk*, with the faults *do* as `shim.c` describes them."""
    faults = {"LD_PRELOAD": str(scene.shim), "FAULT_ROOT": str(disk), "FAULT_DO": do}
    if log is not None:
        faults["FAULT_LOG"] = str(log)
    return subprocess.Popen(
        [*(program or command("run")), str(scene.job), "--set", f"output.path={out(disk)}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**environment(scene), **faults},
    )


def environment(scene: Scene) -> dict[str, str]:
    """The environment in which the package of *scene* runs, without faults."""
    ours = {"PYTHONPATH": f"{scene.package}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **ours, "OMP_NUM_THREADS": "1"}


def finish(process: subprocess.Popen[str]) -> Finished:
    """Wait for *process*; its exit code and all it said."""
    with process:
        said, _ = process.communicate(timeout=_SECONDS)
    return Finished(process.returncode, said)


def run(
    scene: Scene, disk: Path, do: str = "", log: Path | None = None, program: Sequence[str] | None = None
) -> Finished:
    """Run the job on *disk* with the faults *do*, to its end."""
    return finish(start(scene, disk, do, log, program))


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    """Return once *process* has met its `stop` fault."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the run ended before it came to the operation"


def read_log(path: Path) -> list[Operation]:
    """What a run did, in its order."""
    data = path.with_name(f"{path.name}.data").read_bytes()
    return [_operation(line.split("\t"), data) for line in path.read_text().splitlines()]


def _operation(fields: Sequence[str], data: bytes) -> Operation:
    kind, name, other, offset, start_byte, num_bytes = fields
    first = int(start_byte)
    return Operation(kind, Path(name), Path(other), int(offset), data[first : first + int(num_bytes)])


def changes(log: Path) -> list[Operation]:
    """What the shim counted in *log*, from 1."""
    return [operation for operation in read_log(log) if operation.kind != "say"]


def undisturbed(scene: Scene) -> list[tuple[int, Operation]]:
    """What a run changes on its disk when nothing goes wrong, numbered as faults are."""
    if not scene.log.exists():
        run(scene, scene.disk("recorded"), log=scene.log)
    return list(enumerate(changes(scene.log), start=1))


def rows_of(disk: Path) -> list[dict[str, Any]]:
    """All rows of all parts by their place in the source, read with no code of ours."""
    rows = [
        row
        for path in parts(disk)
        for row in pq.read_table(path, page_checksum_verification=True).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["source"], row["row"]))


def stamps(disk: Path) -> dict[str, tuple[int, int, bytes]]:
    """What must not change about a part that is there: its inode, time and bytes."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in parts(disk)}


def harm(scene: Scene, disk: Path) -> Iterator[str]:
    """What is wrong with the parts on *disk* at some instant: unreadable, doubled, or other rows (I1, I2)."""
    try:
        rows = rows_of(disk)
    except (OSError, pa.ArrowException) as error:
        yield f"a part cannot be read: {error}"
        return
    places = [(row["source"], row["row"]) for row in rows]
    if len(places) != len(set(places)):
        yield "a row stands in two parts"
    elif any(row not in scene.rows for row in rows):
        yield "a row is not what it would have been without the trouble"


def harm_after_finish(scene: Scene, disk: Path, finished: Finished) -> Iterator[str]:
    """What is wrong with *disk* after a run that was to complete it (I2, I5, I11, I13)."""
    if finished.code != scene.code:
        yield f"exit {finished.code} instead of {scene.code}: {finished.said}"
        return
    yield from harm(scene, disk)
    if [row["row"] for row in rows_of(disk)] != [row["row"] for row in scene.rows]:
        yield "rows are missing"
    leftovers = [path.name for path in (out(disk) / ".glm4v-batch" / "tmp").iterdir()]
    if leftovers:
        yield f"left over: {leftovers}"


def harm_after_rerun(scene: Scene, disk: Path) -> Iterator[str]:
    """What is wrong with running a finished job again (I4)."""
    before = stamps(disk)
    finished = run(scene, disk)
    if stamps(disk) != before:
        yield "a finished job was changed by running it again"
    if finished.code != scene.code:
        yield f"the second run exits {finished.code} instead of {scene.code}"


def sampled(points: Sequence[Any], num: int) -> list[Any]:
    """All *points* where all are wanted, else *num* of them, evenly spread, with the first and the last."""
    if WANTS_ALL or len(points) <= num:
        return list(points)
    return [points[round(index * (len(points) - 1) / max(1, num - 1))] for index in range(num)]
