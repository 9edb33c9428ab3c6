"""What a job file may say, and how its mistakes are told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import JobError
from glm4v_batch.job import (
    INIT_TEMPLATE,
    PART_COLUMNS,
    DatasetSettings,
    Job,
    ParquetSettings,
    job_schema,
    read_job,
)

MINIMAL = """\
name: caption
source:
  kind: parquet
  path: data/*.parquet
prompt:
  user: "Describe {title}."
model:
  name: data/tiny-glm4v
output:
  path: out/caption
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error without the file's name and the indentation."""
    path = written(folder, text)
    with pytest.raises(JobError) as raised:
        read_job(path, overrides)
    assert raised.value.exit_code == 2
    lines = [line.strip().removeprefix(f"{path} ") for line in str(raised.value).split("\n")]
    return lines[1:] if len(lines) > 1 else lines


def test_a_minimal_job_has_the_documented_defaults(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, MINIMAL))

    assert job.as_dict() == {
        "name": "caption",
        "source": {
            "kind": "parquet",
            "path": "data/*.parquet",
            "root": None,
            "id": None,
            "image": "image",
        },
        "prompt": {"system": None, "user": "Describe {title}."},
        "model": {"name": "data/tiny-glm4v", "revision": None, "dtype": "auto"},
        "images": {
            "min_pixels": None,
            "max_pixels": None,
            "max_image_pixels": 50_000_000,
            "max_image_bytes": 67_108_864,
        },
        "generation": {
            "max_new_tokens": 64,
            "max_new_tokens_column": None,
            "temperature": 0.0,
            "top_p": None,
            "top_k": None,
            "repetition_penalty": 1.0,
            "seed": 0,
        },
        "devices": {
            "use": "all",
            "layout": "auto",
            "gpus_per_replica": "auto",
            "memory_fraction": 0.92,
            "memory_limit_gib": None,
            "offload": "none",
        },
        "batching": {"engine": "auto", "max_batch_size": None, "echo_seconds": 0.0, "echo_replicas": 0},
        "output": {"path": "out/caption", "rows_per_part": 128, "columns": []},
        "limits": {"failed_fraction": 0.2, "failed_window": 1000},
    }
    json.dumps(job.as_dict())


def test_five_mistakes_of_different_kinds_are_five_lines_with_their_numbers(tmp_path: Path) -> None:
    text = """\
name: caption
source:
  kind: parquet
  path: data/*.parquet
prompt:
  usr: "Describe it."
  user: "Describe {title."
model:
  name: data/tiny-glm4v
  dtype: float61
generation:
  max_new_tokens: 0
output:
  path: out/caption
  rows_per_part: many
"""

    assert mistakes(tmp_path, text) == [
        "line 6: prompt.usr is not a setting. Did you mean user?",
        "line 7: prompt.user has a { at character 10 that is never closed. Write {{ for a plain brace",
        (
            "line 10: model.dtype must be auto, bfloat16, float16 or float32 in this version, not float61. "
            "Did you mean float16?"
        ),
        "line 12: generation.max_new_tokens must be 1 or more, not 0",
        "line 15: output.rows_per_part must be a whole number, not many",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  user:", "  usr:", "line 5: prompt.user is missing"),
        (
            "kind: parquet",
            "kind: parquets",
            (
                "line 3: source.kind must be parquet or dataset in this version, "
                "not parquets. Did you mean parquet?"
            ),
        ),
        (
            "kind: parquet",
            "kind: folder",
            ("line 3: source.kind must be parquet or dataset in this version, not folder"),
        ),
        ("  kind: parquet\n", "", "line 2: source.kind is missing; it must be parquet or dataset"),
        (
            "  path: data/*.parquet",
            "  path: x\n  split: test",
            "line 5: source.split is not a setting of this kind of source",
        ),
        (
            "name: caption",
            "name: my job",
            ("line 1: name must be letters, digits, dots, - and _ only, 64 at most, not my job"),
        ),
        ("name: caption", "name: 12", "line 1: name must be text, not 12. Put it in quotes"),
        ("name: caption", "name: [a]", "line 1: name must be text, not a list. Put it in quotes"),
        ("name: data/tiny-glm4v", 'name: ""', "line 8: model.name must not be empty"),
        ("output:", "outputs:", "line 1: output is missing"),
        (
            "model:\n  name: data/tiny-glm4v",
            "model: tiny",
            "line 7: model must be a section of settings, not tiny",
        ),
        ("prompt:\n", "prompt:\n  user: twice\n", "line 7: prompt.user is set twice, first in line 6"),
        (
            "prompt:\n",
            "max_new_tokens: 3\nprompt:\n",
            "line 5: max_new_tokens is not a setting. Did you mean generation.max_new_tokens?",
        ),
        (
            "prompt:\n",
            "prompt:\n  zzzz: 1\n",
            "line 6: prompt.zzzz is not a setting. The settings of prompt are: system, user",
        ),
        (
            "prompt:\n",
            "prompt:\n  system: !!python/name:os.system x\n",
            "line 6: a job file uses no tags such as !!python/name:os.system",
        ),
        ("prompt:\n", "prompt:\n  [a]: x\n", "line 6: the name of a setting must be plain text"),
        (
            "name: data/tiny-glm4v",
            "name: m\n  revision: 0123",
            ("line 9: model.revision must be text, not 123. Put it in quotes"),
        ),
    ],
)
def test_each_mistake_is_told_in_the_users_words(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in MINIMAL

    assert expected in mistakes(tmp_path, MINIMAL.replace(old, new, 1))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "images: {min_pixels: 9, max_pixels: 8}",
            "images.max_pixels must be images.min_pixels (9) or more, not 8",
        ),
        (
            "generation: {top_p: 0.5}",
            ("generation.top_p has no effect at generation.temperature 0: raise that, or leave this out"),
        ),
        ("generation: {temperature: hot}", "generation.temperature must be a number, not hot"),
        (
            'generation: {max_new_tokens: "64"}',
            "generation.max_new_tokens must be a whole number, not 64. Take its quotes away",
        ),
        ("generation: {temperature: true}", "generation.temperature must be a number, not true"),
        ("generation: {temperature: 1e999}", "generation.temperature must be a finite number, not inf"),
        ("generation: {max_new_tokens: 1.5}", "generation.max_new_tokens must be a whole number, not 1.5"),
        ("generation: {repetition_penalty: 0}", "generation.repetition_penalty must be more than 0, not 0"),
        ("generation: 5", "generation must be a section of settings, not 5"),
        ("devices: {memory_fraction: 0}", "devices.memory_fraction must be more than 0, not 0"),
        ("devices: {memory_fraction: 1.1}", "devices.memory_fraction must be 1 or less, not 1.1"),
        (
            "devices: {layout: sharded}",
            (
                "devices.layout must be auto, replicas, balanced, balanced_low_0, sequential or "
                "a map of module names to GPU numbers, not sharded"
            ),
        ),
        (
            "devices: {layout: {model.visual: gpu}}",
            "devices.layout puts model.visual on gpu: a module's name goes with a GPU number, cpu or disk",
        ),
        (
            "devices: {layout: {model.visual: 0}, gpus_per_replica: 2}",
            "devices.gpus_per_replica has no effect where devices.layout is a map: leave it out",
        ),
        (
            "devices: {gpus_per_replica: 0}",
            "devices.gpus_per_replica must be auto or a number of GPUs, not 0",
        ),
        (
            "devices: {use: gpu}",
            "devices.use must be all, cpu or GPU numbers such as [0, 2], not gpu",
        ),
        (
            "devices: {use: []}",
            "devices.use must be all, cpu or GPU numbers such as [0, 2], not a list",
        ),
        ("devices: {use: [0, 0]}", "devices.use names GPU 0 twice"),
        ("devices: {memory_limit_gib: 0}", "devices.memory_limit_gib must be more than 0, not 0"),
        ("devices: {offload: ram}", "devices.offload must be none, cpu or disk in this version, not ram"),
        (
            "batching: {echo_replicas: 2}",
            "batching.echo_replicas has an effect only with batching.engine: echo",
        ),
        (
            "batching: {engine: vllm}",
            "batching.engine must be auto, packed, generate or echo in this version, not vllm",
        ),
        (
            "batching: {echo_seconds: 1}",
            "batching.echo_seconds has an effect only with batching.engine: echo",
        ),
        ("batching: {max_batch_size: 0}", "batching.max_batch_size must be 1 or more, not 0"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, setting: str, expected: str) -> None:
    assert mistakes(tmp_path, f"{MINIMAL}{setting}\n") == [f"line 11: {expected}"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("title", "line 11: output.columns must be a list, not title. Write [title]"),
        ("[title, 3]", "line 11: output.columns[1] must be text, not 3. Put it in quotes"),
        ("[title, title]", "line 11: output.columns names a column twice"),
        ("[status]", "line 11: output.columns names status, a column that every part has already"),
    ],
)
def test_passed_columns_are_a_list_of_other_names(tmp_path: Path, columns: str, expected: str) -> None:
    assert mistakes(tmp_path, f"{MINIMAL}  columns: {columns}\n") == [expected]


def test_the_names_of_part_columns_are_those_that_parts_have() -> None:
    from glm4v_batch.parts import RESULT_FIELDS

    assert tuple(field.name for field in RESULT_FIELDS) == PART_COLUMNS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\n\tsource: b\n", "line 2 is not readable as YAML"),
        ("name: a: b\n", "line 1 is not readable as YAML"),
        ('name: "a\nb\nc\n', "is not readable as YAML"),
        ("name: a\nuser: [b\n", "is not readable as YAML"),
        ("a: &x 1\nb: *x\n", "line 1 is not readable as YAML: a job file uses no & or * aliases"),
        ("name: a\nb: \x07\n", "line 2 holds a control character"),
        ("name: a\n---\nname: b\n", "is not readable as YAML"),
        ("a: 1\n" * 6000, "a job file has no more than 10,000 names and values"),
        ("[" * 30, "settings are nested more than 20 deep"),
        ("- a\n- b\n", "line 1: a job file is made of settings such as name: caption"),
        ("# nothing\n", "holds no settings."),
        ("", "holds no settings."),
    ],
)
def test_what_is_no_yaml_of_settings_is_refused_with_its_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    (line,) = mistakes(tmp_path, text)

    assert expected in line


def test_a_tab_is_called_a_tab(tmp_path: Path) -> None:
    with pytest.raises(JobError) as raised:
        read_job(written(tmp_path, "name: a\nsource:\n\tkind: parquet\n"))

    assert "tab" in raised.value.hint


def test_a_huge_or_deep_file_is_refused_before_it_costs_anything(tmp_path: Path) -> None:
    path = written(tmp_path, "#" * (1 << 20) + "\n")

    with pytest.raises(JobError, match="larger than"):
        read_job(path)
    with pytest.raises(JobError, match="nested more than"):
        read_job(written(tmp_path, "[" * 500_000))


def test_many_mistakes_are_cut_to_a_readable_number(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, MINIMAL + "".join(f"x{i}: 1\n" for i in range(500)))

    assert len(lines) == 51
    assert lines[-1] == "and 450 more"


def test_mistakes_that_are_not_shown_count_too(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "".join(f"x{i}: 1\n" for i in range(51)))

    with pytest.raises(JobError, match=r"^51 mistakes in .*job\.yaml:\n"):
        read_job(path)


def test_a_file_that_is_not_there_or_no_file_or_not_text_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: a\nsource: caf\xe9\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    with pytest.raises(JobError, match="does not exist"):
        read_job(tmp_path / "none.yaml")
    with pytest.raises(JobError, match="is a folder"):
        read_job(tmp_path)
    with pytest.raises(JobError, match="line 2 is not UTF-8"):
        read_job(latin)
    with pytest.raises(JobError, match="no regular file"):
        read_job(fifo)


def test_words_and_dates_are_text_and_exponents_are_numbers(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: data/tiny-glm4v", "name: no\n  revision: 2024-01-01")

    job = read_job(written(tmp_path, f"{text}generation: {{temperature: 1e-3, top_p: .5}}\n"))

    assert (job.model.name, job.model.revision) == ("no", "2024-01-01")
    assert (job.generation.temperature, job.generation.top_p) == (0.001, 0.5)


@given(scalar=st.one_of(st.integers(-(10**17), 10**17), st.booleans(), st.none(), st.text(max_size=20)))
def test_overrides_read_what_yaml_writes(scalar: object) -> None:
    from glm4v_batch.yaml_lines import option_value

    quoted = json.dumps(scalar, ensure_ascii=True) if isinstance(scalar, str) else None
    text = quoted or str(yaml.safe_dump(scalar)).removesuffix("...\n")
    if isinstance(scalar, str) and any(char >= "\ud800" for char in scalar):
        return  # JSON writes characters beyond U+FFFF as surrogate pairs, which YAML reads apart

    assert option_value(text) == scalar


@pytest.mark.parametrize(
    ("option", "section", "setting", "value"),
    [
        ("generation.max_new_tokens=5", "generation", "max_new_tokens", 5),
        ("prompt.user=Title: {title} # really", "prompt", "user", "Title: {title} # really"),
        ("prompt.user={title}", "prompt", "user", "{title}"),
        ("prompt.user=#1 {title}", "prompt", "user", "#1 {title}"),
        ("prompt.user=5 # {title}", "prompt", "user", "5 # {title}"),
        ("prompt.user='5' # {title}", "prompt", "user", "'5' # {title}"),
        ("prompt.user=- {title}", "prompt", "user", "- {title}"),
        ("prompt.user=- {title}\n- {id}", "prompt", "user", "- {title}\n- {id}"),
        ("prompt.user=[{title}]", "prompt", "user", "[{title}]"),
        ("prompt.user=[{title}, {id}]", "prompt", "user", "[{title}, {id}]"),
        ("prompt.user=--- {title}", "prompt", "user", "--- {title}"),
        ("prompt.system=", "prompt", "system", None),
        ('prompt.user="5"', "prompt", "user", "5"),
        ("prompt.system=null", "prompt", "system", None),
        ("output.columns=[title, 'b c']", "output", "columns", ("title", "b c")),
        ("output.columns=[a,b]", "output", "columns", ("a", "b")),
        ("output.columns=[]", "output", "columns", ()),
        ("devices.use=[1, 3]", "devices", "use", (1, 3)),
        ("devices.use=cpu", "devices", "use", "cpu"),
        ("devices.layout={model: 0, lm_head: cpu}", "devices", "layout", {"model": 0, "lm_head": "cpu"}),
        ("devices.layout=balanced", "devices", "layout", "balanced"),
    ],
)
def test_overrides_apply_over_the_file(
    tmp_path: Path, option: str, section: str, setting: str, value: Any
) -> None:
    job = read_job(written(tmp_path, MINIMAL), [option])

    assert getattr(getattr(job, section), setting) == value


def test_mistakes_of_overrides_name_the_override(tmp_path: Path) -> None:
    overrides = ["prompt.usr=x", "generation.max_new_tokens=0", "seed", "prompt.user.x=1"]

    lines = mistakes(tmp_path, MINIMAL.replace("name: caption", "name: 1"), *overrides)

    assert lines == [
        "line 1: name must be text, not 1. Put it in quotes",
        "--set seed: write it as --set section.setting=value",
        "--set prompt.user.x=1: prompt.user is no section",
        "--set prompt.usr=x: prompt.usr is not a setting. Did you mean user?",
        "--set generation.max_new_tokens=0: generation.max_new_tokens must be 1 or more, not 0",
    ]


def test_a_map_of_an_override_that_is_wrong_names_the_override(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, MINIMAL, "devices.layout={model: -1}")

    assert line.startswith("--set devices.layout={model: -1}: devices.layout puts ")


def test_an_override_mends_a_mistake_of_the_file(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, MINIMAL.replace("caption\n", "[1]\n", 1)), ["name=mended"])

    assert job.name == "mended"


def test_asked_columns_name_the_setting_and_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "  columns: [title, caption]\n")

    job = read_job(path, ["source.id=key"])

    assert job.asked_columns() == {
        "--set source.id=key: source.id": ("key",),
        f"{path} source.image": ("image",),
        f"{path} line 6: prompt.user": ("title",),
        f"{path} line 11: output.columns": ("title", "caption"),
    }


def test_the_template_of_init_is_valid_and_shows_the_defaults(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, INIT_TEMPLATE))

    plain = read_job(written(tmp_path, MINIMAL))
    for section in ("images", "generation", "devices", "batching"):
        assert getattr(job, section) == getattr(plain, section)


def test_the_template_of_init_names_every_setting() -> None:
    for section in Job.model_fields.values():
        if isinstance(section.annotation, type) and hasattr(section.annotation, "model_fields"):
            for setting in section.annotation.model_fields:
                assert f"{setting}:" in INIT_TEMPLATE


def test_the_schema_describes_every_setting() -> None:
    schema = job_schema()

    for definition in [schema, *schema["$defs"].values()]:
        assert definition["additionalProperties"] is False
        for setting, described in definition["properties"].items():
            assert described.get("description"), setting
    assert schema["properties"]["source"]["discriminator"]["propertyName"] == "kind"
    json.dumps(schema)


def test_each_kind_of_source_has_its_own_settings(tmp_path: Path) -> None:
    text = MINIMAL.replace("kind: parquet", "kind: dataset\n  split: test")

    assert isinstance(read_job(written(tmp_path, MINIMAL)).source, ParquetSettings)
    assert read_job(written(tmp_path, text)).source == DatasetSettings(
        kind="dataset", path="data/*.parquet", split="test"
    )


def test_reading_a_job_loads_nothing_heavy() -> None:
    code = (
        "import sys, glm4v_batch.job; "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
