"""F14: with any one sync taken out of the package, or `link` made a `rename`, F1 or F2 fails."""

import ast
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import pytest

from tests.e2e.command import ROOT
from tests.faults.conftest import Judge
from tests.faults.harness import Scene, is_part, sampled
from tests.faults.test_kill import violations_of_second_writer
from tests.faults.test_power_loss import (
    broken_promises,
    doubled_rows,
    killed_at,
    number_after,
    redoing,
    replacing,
    uninterrupted,
)

PACKAGE = ROOT / "pipeline" / "glm4v_batch"
SYNCS = ("_sync", "sync_folder", "sync_parent")


@dataclass(frozen=True, slots=True)
class Mutant:
    """The package with *statement* of a function replaced by *other*."""

    module: str
    function: str
    statement: str
    caught_by: str
    other: str = "pass"

    def __str__(self) -> str:
        return f"{self.module}.{self.function}: {self.statement} -> {self.other}"


MUTANTS = [
    Mutant("durable", "write_synced", "_sync(file.fileno())", "power loss"),
    Mutant("durable", "sync_folder", "_sync(descriptor)", "power loss"),
    Mutant("durable", "make_folder", "sync_parent(folder)", "power loss"),
    Mutant("durable", "sync_parent", "sync_folder(folder.resolve().parent)", "power loss"),
    Mutant("durable", "publish", "os.link(temporary, final)", "second writer", "os.rename(temporary, final)"),
    Mutant("parts", "commit", "sync_folder(folder)", "power loss"),
    Mutant("parts", "replace", "sync_folder(folder)", "power loss while replacing"),
    Mutant("changes", "take_away", "sync_folder(lock.folder)", "power loss while redoing"),
    Mutant("output", "locked", "sync_parent(folder)", "power loss after a kill at a folder"),
    Mutant("output", "locked", "sync_folder(folder)", "power loss after a kill at a link"),
]


def statements(module: str) -> Iterator[tuple[str, ast.Expr]]:
    """The plain calls of *module*, each with the function that it stands in."""
    for function in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    yield function.name, node


def mutated(scene: Scene, mutant: Mutant) -> Scene:
    """*scene* over a copy of the package that *mutant* describes."""
    places = [
        node
        for function, node in statements(mutant.module)
        if function == mutant.function and ast.unparse(node) == mutant.statement
    ]
    assert len(places) == 1, f"{mutant} is meant to stand in one place, not in {len(places)}"
    folder = scene.folder / "mutants" / str(MUTANTS.index(mutant))
    shutil.copytree(PACKAGE, folder / "pipeline" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "pipeline" / PACKAGE.name / f"{mutant.module}.py"
    lines = path.read_text().splitlines(keepends=True)
    line = lines[places[0].lineno - 1]
    lines[places[0].lineno - 1] = line.replace(mutant.statement, mutant.other)
    path.write_text("".join(lines))
    for name in ("source", "undisturbed", "job.yaml"):
        (folder / name).symlink_to(scene.folder / name)
    return replace(scene, folder=folder, package=folder / "pipeline")


def harm_of(scene: Scene, test: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What *test* finds wrong with the package of *scene*."""
    match test:
        case "second writer":
            link = number_after(scene, lambda operation: is_part(operation.other)) - 1
            return violations_of_second_writer(scene, link, None)
        case "power loss while redoing":
            return sorted({*chain(*map(doubled_rows, redoing(scene, monkeypatch)))})
        case "power loss while replacing":
            history = replacing(scene, monkeypatch)
        case "power loss after a kill at a folder":
            history = killed_at(scene, number_after(scene, lambda operation: operation.path.name == "out"))
        case "power loss after a kill at a link":
            history = killed_at(scene, number_after(scene, lambda operation: is_part(operation.other)))
        case "power loss":
            history = uninterrupted(scene)
        case other:
            raise AssertionError(other)
    return sorted({*chain(*map(broken_promises, history))})


def test_each_sync_and_the_exclusive_link_are_missed_when_taken_out(
    scene: Scene, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = sampled(MUTANTS, 3)

    survivors = [str(m) for m in chosen if not harm_of(mutated(scene, m), m.caught_by, monkeypatch)]

    judge("F14, mutants that F1 or F2 must catch", len(chosen), survivors)


def test_every_sync_of_the_package_is_among_the_mutants() -> None:
    found = {
        (module, function, ast.unparse(node))
        for module in (path.stem for path in sorted(PACKAGE.glob("*.py")))
        for function, node in statements(module)
        if ast.unparse(node).split("(")[0] in SYNCS
    }

    assert found == {(m.module, m.function, m.statement) for m in MUTANTS if m.other == "pass"}
