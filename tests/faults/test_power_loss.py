"""F2: the power fails after any operation, and of what was not synced anything may be missing."""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.conftest import Judge
from tests.faults.harness import (
    DRIVER,
    Operation,
    Scene,
    harm,
    harm_after_finish,
    is_part,
    read_log,
    run,
    sampled,
    undisturbed,
)
from tests.faults.power_loss import Disk, Tree, write_tree


@dataclass(frozen=True, slots=True)
class State:
    """What a power loss left; the parts that were called committed, and those that stood there, by then."""

    tree: Tree
    promised: Mapping[Path, bytes]
    visible: Tree


def record(scene: Scene, disk: Path, fault: str = "") -> list[Operation]:
    log = disk.with_suffix(".log")
    run(scene, disk, fault, log=log, program=DRIVER)
    return read_log(log)


def uninterrupted(scene: Scene) -> Iterator[State]:
    disk = scene.disk("uninterrupted")
    return states(disk, record(scene, disk))


def killed_at(scene: Scene, number: int) -> Iterator[State]:
    """A run killed at operation *number*, and a second one that goes on: a kill does not sync anything."""
    disk = scene.disk(f"killed-at-{number}")
    return states(disk, [*record(scene, disk, f"kill:{number}"), *record(scene, disk)])


def replacing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """A finished job whose parts are all replaced by a second run."""
    disk = scene.disk("replacing")
    first = record(scene, disk)
    monkeypatch.setenv("FAULT_REPLACES", "1")
    return states(disk, [*first, *record(scene, disk)])


def redoing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """A finished job, one of whose sources changes and is done again, in parts of another size."""
    source, disk = scene.folder / "changing", scene.disk("redoing")
    shutil.copytree(scene.folder / "source", source)
    with monkeypatch.context() as patched:
        patched.setenv("FAULT_SETS", f"source.path={source}/*.parquet")
        first = record(scene, disk)
        shutil.copy(source / "shard-1.parquet", source / "shard-0.parquet")
        patched.setenv("FAULT_SETS", f"source.path={source}/*.parquet output.rows_per_part=3")
        patched.setenv("FAULT_REDOES", "1")
        second = record(scene, disk)
    return states(disk, [*first, *second])


def states(root: Path, operations: Sequence[Operation]) -> Iterator[State]:
    """Each state of *root* that a power loss could leave after any of *operations*."""
    disk = Disk(root)
    promised: dict[Path, bytes] = {}
    for operation in operations:
        if operation.kind == "say":
            promised |= {path: disk.now()[path] or b"" for path in claims(operation, root)}
        else:
            disk.apply(operation)
        visible = {path: data for path, data in disk.now().items() if is_part(path)}
        for tree in disk.after_power_loss():
            yield State(tree, dict(promised), visible)


def claims(said: Operation, root: Path) -> list[Path]:
    lines = [line.split() for line in said.data.decode().splitlines()]
    return [Path(line[1]).relative_to(root) for line in lines if line and line[0] == "committed"]


def broken_promises(state: State) -> Iterator[str]:
    """What is wrong with *state* at sight: half a part under its name (I1), a committed one gone (I3)."""
    for path, data in state.tree.items():
        if is_part(path) and not is_whole(data or b""):
            yield f"{path.name} is visible and not whole"
    for path, data in state.promised.items():
        # One that is being replaced may be the new one already.
        if state.tree.get(path) not in (data, state.visible.get(path)):
            yield f"{path.name} was called committed and is not there"


def doubled_rows(state: State) -> Iterator[str]:
    """Rows that stand in two parts of *state* (I2)."""
    parts = {path: places_in(data or b"") for path, data in state.tree.items() if is_part(path)}
    for (one, places), (other, others) in combinations(sorted(parts.items()), 2):
        if places & others:
            yield f"{one.name} and {other.name} hold the same rows"


@cache
def places_in(data: bytes) -> frozenset[tuple[str, int]]:
    if not is_whole(data):
        return frozenset()
    table = pq.read_table(io.BytesIO(data), columns=["source", "row"])
    return frozenset(zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True))


@cache
def is_whole(data: bytes) -> bool:
    try:
        return bool(pq.read_table(io.BytesIO(data), page_checksum_verification=True).num_rows)
    except (OSError, pa.ArrowException):
        return False


def test_nothing_that_was_called_committed_is_lost_with_the_power(
    scene: Scene, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_a_link = number_after(scene, lambda operation: is_part(operation.other))
    histories = [
        uninterrupted(scene),
        *(killed_at(scene, number) for number in sampled([after_a_link, 2, 3, 4], 2)),
        replacing(scene, monkeypatch),
    ]

    found = [list(broken_promises(state)) for history in histories for state in history]

    judge("F2, power loss after every change of the disk", len(found), sorted({*chain(*found)}))


def test_old_and_new_rows_of_a_changed_source_never_stand_side_by_side(
    scene: Scene, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [list(doubled_rows(state)) for state in redoing(scene, monkeypatch)]

    judge("F2, power loss while a changed source is redone", len(found), sorted({*chain(*found)}))


def number_after(scene: Scene, is_meant: Callable[[Operation], bool]) -> int:
    """The number of the operation that follows the first one that *is_meant*."""
    return next(number for number, operation in undisturbed(scene) if is_meant(operation)) + 1


def alike(tree: Tree) -> frozenset[tuple[Path, object]]:
    """What two trees have in common that a run cannot tell apart: all but the bytes of figures for people."""
    return frozenset(
        (path, hash(data) if is_part(path) or data is None else bool(data)) for path, data in tree.items()
    )


def different(history: Iterable[State]) -> list[Tree]:
    return list({alike(state.tree): state.tree for state in history}.values())


def harm_after_resuming(scene: Scene, tree: Tree, name: str) -> list[str]:
    disk = scene.disk(name)
    write_tree(tree, disk)
    found = [*harm(scene, disk), *harm_after_finish(scene, disk, run(scene, disk))]
    shutil.rmtree(disk)
    return [f"{name}: {what}; it held {sorted(map(str, tree))}" for what in found]


def test_a_run_goes_on_from_whatever_a_power_loss_leaves(scene: Scene, judge: Judge) -> None:
    disk = scene.disk("resumed")
    trees = sampled(different(states(disk, record(scene, disk))), 6)

    violations = [v for n, tree in enumerate(trees) for v in harm_after_resuming(scene, tree, f"state-{n}")]

    judge("F2, resumed from what a power loss left", len(trees), violations)
