"""What the docs say is what the code does."""

import doctest
import importlib
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import glm4v_batch
from glm4v_batch import errors
from glm4v_batch.cli import main
from glm4v_batch.errors import JobError
from glm4v_batch.job import Job, read_job
from glm4v_batch.parts import RESULT_FIELDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Triton comes with torch's CUDA builds only.
KERNELS = {"glm4v_batch.engines.attention_kernel", "glm4v_batch.engines.hopper_attention"}
NEED_TRITON = KERNELS if find_spec("triton") is None else set()
MODULES = [
    module.name
    for module in pkgutil.walk_packages(glm4v_batch.__path__, "glm4v_batch.")
    if module.name not in NEED_TRITON
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_some_docstrings_have_examples() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 8


def test_the_job_file_of_the_readme_is_valid_and_names_every_section(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "job.yaml").write_text(text)

    read_job(tmp_path / "job.yaml")

    assert set(yaml.safe_load(text)) == set(Job.model_fields)


def test_the_mistakes_of_the_readme_are_those_that_are_found(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsource:\n  kind: parquet\n  path: data/*.parquet\nprompt:\n"
        '  usr: "Describe."\nmodel: {name: m}\ngeneration:\n  max_new_tokens: 0\noutput: {path: out/mine}\n'
    )

    with pytest.raises(JobError) as caught:
        read_job(path)

    shown = str(caught.value).replace(str(path), "jobs/mine.yaml")
    assert f"Error: {shown}\n" in README


def test_every_exit_code_is_explained() -> None:
    table = README[README.index("| exit | meaning |") :]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    explained = {int(number) for row in rows for number in row.split(", ")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]

    used = {kind.exit_code for kind in kinds if issubclass(kind, errors.Glm4vBatchError)}

    assert explained == used | {0, 3, 129, 130, 143}


def test_every_command_and_column_is_in_the_readme() -> None:
    assert all(f"glm4v-batch {name}" in README for name in main.commands)
    flat = " ".join(README.split())
    assert re.sub(r" \([^)]*\)", "", flat).count(", ".join(field.name for field in RESULT_FIELDS)) == 1
