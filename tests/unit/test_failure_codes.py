"""The list of failure codes, the code that uses them and the README's table agree."""

import ast
import re
from pathlib import Path
from typing import get_args

from glm4v_batch.failure_codes import FAILURE_KINDS, FailureCode, Stage

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pipeline" / "glm4v_batch"


def words_in_the_code() -> set[str]:
    """Every string in the package but those of the list itself."""
    return {
        node.value
        for path in PACKAGE.rglob("*.py")
        if path.name != "failure_codes.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def table_of_the_readme() -> list[list[str]]:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("| code | stage | what was wrong | what to do |")
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_code_is_explained_and_no_other() -> None:
    assert tuple(FAILURE_KINDS) == get_args(FailureCode)


def test_every_code_is_used_somewhere_in_the_package() -> None:
    assert set(FAILURE_KINDS) <= words_in_the_code()


def test_every_error_of_a_record_names_a_stage_that_its_code_has() -> None:
    calls = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RecordError"
    ]
    named = [tuple(arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant)) for call in calls]
    known = {(stage, code) for code, kind in FAILURE_KINDS.items() for stage in kind.stages}

    assert len(calls) > 15
    assert [pair for pair in named if len(pair) == 2 and pair not in known] == []


def test_stages_are_those_of_the_pipe() -> None:
    used = {stage for kind in FAILURE_KINDS.values() for stage in kind.stages}

    assert used == set(get_args(Stage))


def test_the_readme_holds_the_list_word_for_word() -> None:
    expected = [
        [f"`{code}`", ", ".join(kind.stages), kind.meaning, kind.remedy]
        for code, kind in FAILURE_KINDS.items()
    ]

    assert table_of_the_readme() == expected


def test_the_readme_mentions_no_code_that_there_is_not() -> None:
    text = (ROOT / "README.md").read_text()
    mentioned = re.findall(r"`((?:image|prompt|decoder|replica|record|path|url)_[a-z_]+)`", text)

    assert set(mentioned) <= set(FAILURE_KINDS)
