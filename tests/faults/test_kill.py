"""F1: kill -9 at every operation that changes the disk, and whatever a second writer does at a link."""

import os
import shutil
import signal

from tests.faults.conftest import Judge
from tests.faults.harness import (
    Scene,
    finish,
    harm,
    harm_after_finish,
    harm_after_rerun,
    is_part,
    out,
    run,
    sampled,
    start,
    undisturbed,
    wait_until_stopped,
)


def violations_of_kill(scene: Scene, fault: str, *, again: bool) -> list[str]:
    """Kill a run by *fault*, perhaps the next one too, and let one finish; what was wrong on the way."""
    disk = scene.disk(fault.replace(":", "-"))
    killed = run(scene, disk, fault)
    if killed.code != -signal.SIGKILL:
        return [f"{fault}: was not met, exit {killed.code}"]
    found = list(harm(scene, disk))
    if again:
        # Recovery is shorter, the more was committed: 2 is its first folder or file, 5 to 9 mostly a commit.
        run(scene, disk, f"kill:{int(fault.split(':')[1]) % 9 + 1}")
        found += harm(scene, disk)
    found += harm_after_finish(scene, disk, run(scene, disk))
    if again:
        found += harm_after_rerun(scene, disk)
    shutil.rmtree(disk)
    return [f"{fault}: {what}" for what in found]


def test_a_run_killed_anywhere_goes_on_to_the_same_parts(scene: Scene, judge: Judge) -> None:
    operations = undisturbed(scene)
    kills = [f"kill:{number}" for number, _ in operations]
    tears = [f"tear:{number}" for number, change in operations if change.kind == "write"]
    points = sampled(kills, 5) + sampled(tears[1:], 1)

    violations = [
        violation
        for index, point in enumerate(points)
        for violation in violations_of_kill(scene, point, again=index % 5 == 3)
    ]

    judge("F1, kill -9 at every change of the disk", len(points), violations)


def violations_of_second_writer(scene: Scene, number: int, theirs: bytes | None) -> list[str]:
    """Let a part's name be taken just before its link, by an equal part or by *theirs*."""
    disk = scene.disk(f"taken-{number}-{theirs is None}")
    with start(scene, disk, f"stop:{number}") as process:
        wait_until_stopped(process)
        (temporary,) = (out(disk) / ".glm4v-batch" / "tmp").iterdir()
        final = out(disk) / temporary.name.rsplit(".", 1)[0]
        original = out(scene.folder / "undisturbed") / final.name
        final.write_bytes(original.read_bytes() if theirs is None else theirs)
        before = final.stat()
        os.kill(process.pid, signal.SIGCONT)
        finished = finish(process)
    after = final.stat()
    found = []
    if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
        found.append("a part that was there already was replaced")
    if theirs is None:
        found += harm_after_finish(scene, disk, finished)
    elif finished.code != 5 or final.read_bytes() != theirs:
        found.append(f"a foreign file under a part's name did not stop the run: exit {finished.code}")
    return [f"link {number}: {what}" for what in found]


def test_a_name_that_is_taken_is_never_taken_over(scene: Scene, judge: Judge) -> None:
    operations = undisturbed(scene)
    links = [number for number, change in operations if is_part(change.other)]
    points = [(number, theirs) for number in sampled(links, 1) for theirs in (None, b"somebody's work")]

    violations = [v for number, theirs in points for v in violations_of_second_writer(scene, number, theirs)]

    judge("F1, a second writer at every link", len(points), violations)
