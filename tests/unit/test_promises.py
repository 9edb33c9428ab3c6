"""The README's table of promises names tests that exist, and forgets no promise."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = "## What we promise and how it is tested"


def rows() -> list[list[str]]:
    """The cells of each promise: its number, the promise, its tests, what they last showed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index(SECTION) :].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:3] == "| I"
    ]


ROWS = rows()


def functions_of(path: str) -> set[str]:
    """The names of the test functions of a file, read without importing it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_invariant_is_promised_once_in_order() -> None:
    assert [row[0] for row in ROWS] == [f"I{number}" for number in range(1, 15)]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_promise_names_tests_that_exist_and_what_they_showed(row: list[str]) -> None:
    _, promise, tests, figure = row

    named = re.findall(r"`([^`]+)`", tests)

    assert promise.endswith(".")
    assert named
    for path, _, name in (each.partition("::") for each in named):
        assert (ROOT / path).is_file(), path
        assert not name or (name.startswith("test_") and name in functions_of(path)), f"{path}::{name}"
    assert re.search(r"\d|every setting judged", figure)
