"""F4: the disk refuses a call, once or from then on; and file systems that lack what we prefer."""

import errno
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import pytest

from tests.faults.conftest import Judge
from tests.faults.harness import (
    Finished,
    Operation,
    Scene,
    changes,
    harm,
    harm_after_finish,
    is_part,
    out,
    parts,
    rows_of,
    run,
    sampled,
    undisturbed,
)

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
NO_LINKS = f"fail:link:1+:{errno.EPERM}"
NO_FLAGS = f"fail:renameat2:1+:{errno.EINVAL}"


def operations(scene: Scene, disk: Path, do: str = "") -> tuple[Finished, list[Operation]]:
    log = disk.with_suffix(".log")
    finished = run(scene, disk, do, log=log)
    return finished, changes(log)


def every_failure(done: Sequence[Operation]) -> list[str]:
    """Each call of each kind to fail once and for ever, with every error somewhere."""
    counts = Counter(operation.kind for operation in done)
    # Opening what is there changes nothing and is not in the log; there are about as many.
    calls = [(kind, n) for kind, count in sorted(counts.items()) for n in range(1, count + 1)]
    calls += [("open", n) for n in range(1, counts["create"] + counts["fsync"] + 1)]
    numbers = cycle(ERRORS)
    return [f"fail:{kind}:{n}{lasting}:{next(numbers)}" for kind, n in calls for lasting in ("", "+")]


def violations_of(scene: Scene, fault: str) -> list[str]:
    disk = scene.disk(re.sub(r"\W", "-", fault))
    found = list(harm_of_trouble(scene, disk, run(scene, disk, fault)))
    found += harm_after_finish(scene, disk, run(scene, disk))
    shutil.rmtree(disk)
    return [f"{fault}: {what}" for what in found]


def harm_of_trouble(scene: Scene, disk: Path, finished: Finished) -> Iterator[str]:
    """What is wrong with how a run met the trouble: it is said, and either survived or exit 5 (I12)."""
    yield from harm(scene, disk)
    if "Traceback" in finished.said:
        yield f"a traceback: {finished.said}"
    elif finished.code == scene.code:
        yield from harm_after_finish(scene, disk, finished)
    elif finished.code != 5 or "Error: " not in finished.said or "run the same command" not in finished.said:
        yield f"exit {finished.code}: {finished.said}"


def test_a_disk_that_refuses_fails_the_run_and_no_record(scene: Scene, judge: Judge) -> None:
    faults = sampled(every_failure([change for _, change in undisturbed(scene)]), 5)

    violations = [violation for fault in faults for violation in violations_of(scene, fault)]

    judge("F4, failing calls", len(faults), violations)


def first_sync_of_a_part(scene: Scene) -> int:
    """Its number among the syncs."""
    syncs = [change.path.name for _, change in undisturbed(scene) if change.kind == "fsync"]
    return next(number for number, name in enumerate(syncs, start=1) if name.startswith("part-"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_fsync_is_never_tried_again_on_that_file(scene: Scene, tmp_path: Path, number: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    finished, done = operations(scene, disk, f"fail:fsync:{first_sync_of_a_part(scene)}:{number}")

    assert finished.code == scene.code, finished.said
    written = [o.path for o in done if o.kind == "create" and o.path.name.startswith("part-")]
    synced = [o.path for o in done if o.kind == "fsync" and o.path.name.startswith("part-")]
    assert written[0] not in synced
    assert synced[0] == written[1] != written[0]
    assert not list(harm_after_finish(scene, disk, finished))


def test_a_part_whose_name_cannot_be_synced_is_not_called_committed(scene: Scene, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    finished, _ = operations(scene, disk, f"fail:fsync:{first_sync_of_a_part(scene) + 1}:{errno.EIO}")
    resumed, done = operations(scene, disk)

    assert finished.code == 5
    assert "Input/output error" in finished.said
    # The part is there, and the next run syncs the folder before it counts it.
    assert [change.kind for change in done[:4] if change.path in (out(disk), out(disk).parent)] == [
        "fsync"
    ] * 2
    assert not list(harm_after_finish(scene, disk, resumed))


@pytest.mark.parametrize(
    ("do", "way"),
    [
        pytest.param(NO_LINKS, "rename that replaces nothing", id="no-links"),
        pytest.param(f"{NO_LINKS},{NO_FLAGS}", "plain rename", id="no-exclusive-rename-either"),
    ],
)
def test_without_hard_links_parts_are_renamed_and_that_is_said_once(
    scene: Scene, tmp_path: Path, do: str, way: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    finished, done = operations(scene, disk, do)

    assert finished.said.count(way) == 1, finished.said
    assert len([change for change in done if is_part(change.other)]) == len(parts(disk))
    assert not list(harm_after_finish(scene, disk, finished))


def test_without_hard_links_a_name_that_is_taken_stays_as_it_is(scene: Scene, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    run(scene, disk)
    kept, gone = parts(disk)[:2]
    gone.unlink()
    before = kept.stat()

    finished = run(scene, disk, f"{NO_LINKS},{NO_FLAGS}")

    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(harm_after_finish(scene, disk, finished))


def test_a_report_that_cannot_be_written_fails_nothing(scene: Scene, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    num_renames = sum(change.kind == "rename" for _, change in undisturbed(scene))

    finished, _ = operations(scene, disk, f"fail:rename:{num_renames}:{errno.ENOSPC}")

    assert finished.code == scene.code
    assert "the report of this run is incomplete" in finished.said
    assert not list(harm_after_finish(scene, disk, finished))


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for ever"])
def test_a_run_that_its_disk_ends_says_how_far_it_came_and_how_to_go_on(
    scene: Scene, tmp_path: Path, lasts: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    creates = [change.path for _, change in undisturbed(scene) if change.kind == "create"]
    third = [number for number, path in enumerate(creates, start=1) if path.name.startswith("part-")][2]

    ended = run(scene, disk, f"fail:create:{third}{'+' if lasts else ''}:{errno.ENOSPC}")

    assert ended.code == 5, ended.said
    assert "cannot be written: No space left on device" in ended.said.splitlines()[-4]
    assert ended.said.splitlines()[-2:] == [
        f"  8 of 15 rows were committed in {out(disk)} by then.",
        f"  Resume with: glm4v-batch run {scene.job} --set output.path={out(disk)}",
    ]
    assert len(rows_of(disk)) == 8
    report = out(disk) / ".glm4v-batch" / "report.json"
    assert report.exists() is not lasts
    assert lasts or json.loads(report.read_text())["rows"]["committed"] == 8
    assert not list(harm_after_finish(scene, disk, run(scene, disk)))
