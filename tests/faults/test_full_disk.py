"""F5: a disk that is really full or read-only and then is not, and a folder that goes away under a run."""

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import image_bytes
from tests.faults.harness import (
    Finished,
    Scene,
    complete,
    finish,
    harm,
    harm_after_finish,
    out,
    parts,
    run,
    start,
    undisturbed,
    wait_until_stopped,
)

MIB = 1024**2


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, shim: Path) -> Scene:
    """Forty rows whose titles do not compress: ten parts of about a quarter of a MiB."""
    folder = tmp_path_factory.mktemp("large") / "scene"
    (folder / "source").mkdir(parents=True)
    titles = [os.urandom(64 * 1024).hex() for _ in range(40)]
    images = [image_bytes(row, (28, 28)) for row in range(40)]
    table = pa.table({"id": [f"id-{row}" for row in range(40)], "title": titles, "image": images})
    pq.write_table(table, folder / "source" / "shard-0.parquet")
    # The titles pass through to the parts and stay out of the prompts.
    return complete(Scene(folder, shim), prompt="Describe.")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def give_room(disk: Path) -> None:
    remount(disk, "size=64m")


def assert_refused(scene: Scene, disk: Path, finished: Finished, reason: str) -> None:
    assert finished.code == 5, finished.said
    assert reason in finished.said
    assert "run the same command again" in finished.said
    assert not list(harm(scene, disk))


def test_a_run_ends_before_its_disk_is_full_and_goes_on_when_there_is_room(
    large: Scene, small_disk: Path
) -> None:
    refused = run(large, small_disk)
    num_parts = len(parts(small_disk))
    free_bytes = shutil.disk_usage(small_disk).free
    give_room(small_disk)
    finished = run(large, small_disk)

    assert_refused(large, small_disk, refused, "MiB free, and what is to be written next needs about")
    assert num_parts > 0
    assert free_bytes > MIB // 2
    assert not list(harm_after_finish(large, small_disk, finished))


def test_a_disk_that_fills_up_all_the_same_costs_no_record(large: Scene, small_disk: Path) -> None:
    refused = run(large, small_disk, "blind")
    give_room(small_disk)
    finished = run(large, small_disk)

    assert_refused(large, small_disk, refused, "No space left on device")
    assert not list(harm_after_finish(large, small_disk, finished))


def test_a_disk_that_became_read_only_costs_no_record(scene: Scene, small_disk: Path) -> None:
    give_room(small_disk)
    run(scene, small_disk)
    parts(small_disk)[0].unlink()
    remount(small_disk, "ro")
    refused = run(scene, small_disk)
    remount(small_disk, "rw")
    finished = run(scene, small_disk)

    assert_refused(scene, small_disk, refused, "Read-only file system")
    assert not list(harm_after_finish(scene, small_disk, finished))


def test_a_file_that_may_not_grow_costs_no_record(large: Scene, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 8, limits[1]))
    try:
        refused = run(large, disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    finished = run(large, disk)

    assert_refused(large, disk, refused, "File too large")
    assert not list(harm_after_finish(large, disk, finished))


def stopped_at_a_commit(scene: Scene, disk: Path, meanwhile: Callable[[], object]) -> Finished:
    """Stop a run in the middle of writing its second part, do something, let it go on."""
    numbers = [n for n, c in undisturbed(scene) if c.kind == "create" and c.path.name.startswith("part-")]
    with start(scene, disk, f"stop:{numbers[1]}") as process:
        wait_until_stopped(process)
        meanwhile()
        os.kill(process.pid, signal.SIGCONT)
        return finish(process)


def test_a_folder_removed_under_way_ends_the_run_and_is_not_made_again(scene: Scene, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    ended = stopped_at_a_commit(scene, disk, lambda: shutil.rmtree(out(disk)))
    is_there = out(disk).exists()
    again = run(scene, disk)

    assert_refused(scene, disk, ended, "moved or removed while the run went on")
    assert not is_there
    assert not list(harm_after_finish(scene, disk, again))


def test_a_folder_moved_away_and_made_anew_is_another_runs(scene: Scene, tmp_path: Path) -> None:
    disk, moved = tmp_path / "disk", tmp_path / "moved"
    disk.mkdir()

    def take_over() -> None:
        out(disk).rename(moved)
        assert run(scene, disk).code == scene.code

    ended = stopped_at_a_commit(scene, disk, take_over)

    assert ended.code == 75, ended.said
    assert "its lock file was replaced" in ended.said
    report = json.loads((out(disk) / ".glm4v-batch" / "report.json").read_text())
    assert report["rows"]["committed"] == len(scene.rows)  # the other run's, as it left it
    assert not list(harm_after_finish(scene, disk, run(scene, disk)))


@pytest.mark.parametrize("whole", [True, False], ids=["state-folder", "lock-file"])
def test_a_lost_lock_ends_the_run_before_it_writes_another_part(
    scene: Scene, tmp_path: Path, whole: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    state = out(disk) / ".glm4v-batch"
    before: list[Path] = []

    def lose() -> None:
        before.extend(parts(disk))
        shutil.rmtree(state) if whole else (state / "lock").unlink()

    ended = stopped_at_a_commit(scene, disk, lose)

    assert ended.code == 5, ended.said
    # With only the lock file gone, the part that was being written may still get its name.
    assert len(parts(disk)) <= len(before) + 1
    assert not list(harm_after_finish(scene, disk, run(scene, disk)))
