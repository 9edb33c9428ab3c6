"""The bench on the bundled tiny model: its table tells what stands in the folders that it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from glm4v_batch.parts import STATE_FOLDER
from glm4v_batch.report import read_runs
from tests.bench.measure import Figures
from tests.bench.table import table
from tests.bench.workloads import w2
from tests.e2e.command import ROOT


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)


@pytest.mark.parametrize("engine", ["packed", "generate"])
def test_the_table_agrees_with_the_folder(tmp_path: Path, engine: str) -> None:
    found = bench(
        tmp_path, "--model", "tiny", "--work", "w2", "--rows", "3", "--engine", engine,
        "--out", tmp_path / "figures.json", "--commit", "abc1234",
    )  # fmt: skip

    assert found.returncode == 0, found.stdout + found.stderr
    written = json.loads((tmp_path / "figures.json").read_text())
    [line] = written["lines"]
    [out] = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    rows = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    report = json.loads((out / STATE_FOLDER / "report.json").read_text())
    peaks = [peak for _, run in read_runs(out) for peak in run.peak_bytes]
    assert table([Figures(**line)]) in found.stdout
    assert "commit abc1234" in found.stdout
    assert [row["completion_tokens"] for row in sorted(rows, key=lambda row: row["id"])] == [
        tokens for _, _, tokens in w2(3)
    ]
    assert (line["engine"], line["rows"], line["failed"], line["wrong_length"]) == (engine, 3, 0, 0)
    assert line["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert line["completion_tokens"] == sum(row["completion_tokens"] for row in rows)
    assert line["out_of_memory"] == report["batches"]["out_of_memory"]
    assert line["peak_allocated_gib"] == pytest.approx(max(peaks) / 2**30)
    between = report["seconds_to"]["first_part"] - report["seconds_to"]["first_ready"]
    assert line["first_part_seconds"] - line["load_seconds"] == pytest.approx(between, abs=0.01)
    assert line["load_seconds"] < line["first_part_seconds"] < line["seconds"]
    assert line["images_per_second_overall"] == pytest.approx(3 / line["seconds"])
    assert line["images_per_second"] > line["images_per_second_overall"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "packed"), "give --work too"),
        (("--model", "tiny", "--devices", "2"), "have no effect on the CPU"),
    ],
)
def test_an_option_without_effect_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    found = bench(tmp_path / "work", *arguments)

    assert found.returncode == 2
    assert message in found.stderr
    assert not (tmp_path / "work").exists()
