"""Figures of a run, and what the next run learns from them."""

import json
from pathlib import Path

import pytest

from glm4v_batch.parts import STATE_FOLDER
from glm4v_batch.report import Report, batch_figures, read_report, read_runs, read_samples
from glm4v_batch.types import BatchRun, Chunk
from tests.builders import completion, failure, shape

CHUNK = Chunk("a.parquet", 0, 10)


def batch(predicted: int = 100, peak: int = 100, *, out_of_memory: bool = False) -> BatchRun:
    return BatchRun(shape(4), (predicted,), (peak,), (200,), out_of_memory, 1.5, 400, 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / STATE_FOLDER / "tmp").mkdir(parents=True)
    return tmp_path


def test_a_report_counts_answers_and_failures_by_code(folder: Path) -> None:
    report = Report(folder, "model on cpu")
    for result in (
        completion(0, CHUNK),
        failure(1, CHUNK),
        failure(2, CHUNK),
        failure(3, CHUNK, "image_format"),
    ):
        report.add_result(result)

    report.write()

    read = read_report(folder)
    assert read is not None
    assert read["rows"] == {"ok": 1, "failed": 3, "committed": 0}
    assert read["failures"] == {"image_truncated": 2, "image_format": 1}
    assert read["tokens"] == {"prompt": 12, "completion": 3}


def test_batches_are_read_back_as_they_were(folder: Path) -> None:
    report = Report(folder, "model on cpu")
    report.add_batch(batch())
    report.add_batch(batch(out_of_memory=True))

    assert [run for _, run in read_runs(folder)] == [batch(), batch(out_of_memory=True)]


def test_samples_of_another_model_or_device_do_not_count(folder: Path) -> None:
    Report(folder, "model on cpu").add_batch(batch(peak=1))
    Report(folder, "model on cuda:0").add_batch(batch(peak=2))

    assert [sample.peak_bytes for sample in read_samples(folder, "model on cuda:0")] == [(2,)]


def test_a_line_that_a_crash_cut_short_is_passed_over(folder: Path) -> None:
    Report(folder, "c").add_batch(batch())
    path = folder / STATE_FOLDER / "batches.jsonl"
    whole = path.read_text()

    path.write_text(whole + whole[: len(whole) // 2])

    assert len(list(read_runs(folder))) == 1


def test_figures_compare_predicted_and_measured_peaks() -> None:
    runs = [batch(100, 100)] * 19 + [batch(150, 100)] + [batch(out_of_memory=True)]

    figures = batch_figures(runs)

    assert figures["num"] == 21
    assert figures["out_of_memory"] == 1
    assert figures["prediction_error_p95"] == 0.5
    assert figures["budget_used_median"] == 0.5


def test_a_missing_or_broken_report_is_none(folder: Path) -> None:
    assert read_report(folder) is None
    (folder / STATE_FOLDER / "report.json").write_text(json.dumps({"rows": 1})[:-2])
    assert read_report(folder) is None
