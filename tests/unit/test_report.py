"""Figures of a run, and what the next run learns from them."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from glm4v_batch.devices import DeviceUse
from glm4v_batch.parts import STATE_FOLDER
from glm4v_batch.report import Report, batch_figures, read_report, read_runs, trim_runs
from glm4v_batch.speed import TimeEstimate
from glm4v_batch.types import BatchRun, Chunk, ReplicaLost, ReplicaReady
from tests.builders import completion, failure, shape

CHUNK = Chunk("a.parquet", 0, 10)


def batch(predicted: int = 100, peak: int = 100, *, out_of_memory: bool = False) -> BatchRun:
    return BatchRun(shape(4), (predicted,), (peak,), (200,), out_of_memory, 1.5, 400, 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / STATE_FOLDER / "tmp").mkdir(parents=True)
    return tmp_path


def test_a_report_counts_answers_and_failures_by_code(folder: Path) -> None:
    report = Report(folder, ["model on cpu"])
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


def test_a_report_that_cannot_be_written_says_so_and_raises_nothing(folder: Path) -> None:
    report = Report(folder, ["model on cpu"])
    (folder / STATE_FOLDER / "tmp").rmdir()
    (folder / STATE_FOLDER / "batches.jsonl").mkdir()

    report.add_batch(batch())
    report.write()

    assert "batches.jsonl: Is a directory" in report.trouble
    assert read_report(folder) is None


def test_batches_are_read_back_as_they_were(folder: Path) -> None:
    report = Report(folder, ["model on cpu"])
    report.add_batch(batch())
    report.add_batch(batch(out_of_memory=True))

    assert [run for _, run in read_runs(folder)] == [batch(), batch(out_of_memory=True)]


def test_each_batch_is_kept_under_the_context_of_its_replica(folder: Path) -> None:
    report = Report(folder, ["model on a large card", "model on a small card"])

    report.add_batch(batch(peak=1))
    report.add_batch(replace(batch(peak=2), replica=1))

    assert [(context, run.peak_bytes) for context, run in read_runs(folder)] == [
        ("model on a large card", (1,)),
        ("model on a small card", (2,)),
    ]


def test_lines_of_an_earlier_version_are_still_read(folder: Path) -> None:
    Report(folder, ["c"]).add_batch(batch())
    path = folder / STATE_FOLDER / "batches.jsonl"
    line = json.loads(path.read_text())
    del line["replica"], line["reserved_bytes"]

    path.write_text(json.dumps(line) + "\n")

    assert list(read_runs(folder)) == [("c", batch())]


def test_a_report_tells_of_replicas_devices_and_the_plan(folder: Path) -> None:
    report = Report(folder, ["c", "c"], TimeEstimate(60.0, 30.0, 120.0, is_measured=False))
    report.add_replica(ReplicaReady(0, 12.5, (100,)))
    report.add_replica(ReplicaReady(1, 14.25, (100,)))
    report.add_replica(ReplicaLost(1, "its process died: signal 9", 3))

    report.add_uses([DeviceUse(0, 70, 100, 0.5), DeviceUse(1, 10, 100, None)])
    report.add_uses([DeviceUse(0, 80, 100, 1.0)])

    told = report.as_dict()
    assert told["replicas"]["load_seconds"] == 14.25
    assert [loss["reason"] for loss in told["replicas"]["lost"]] == ["its process died: signal 9"]
    assert told["devices"] == [
        {"index": 0, "peak_used_bytes": 80, "utilisation_mean": 0.75},
        {"index": 1, "peak_used_bytes": 10, "utilisation_mean": None},
    ]
    assert told["plan"]["seconds"] == 60.0
    assert told["plan"]["actual_seconds"] >= 0


def test_the_time_of_a_part_of_the_work_is_not_held_against_the_plan_for_all(folder: Path) -> None:
    report = Report(folder, ["c"], TimeEstimate(60.0, 30.0, 120.0, is_measured=False), num_expected=3)

    assert report.as_dict()["plan"]["actual_seconds"] is None
    report.num_committed = 3
    assert report.as_dict()["plan"]["actual_seconds"] >= 0


def test_a_report_adds_up_the_phases_that_batches_tell_of(folder: Path) -> None:
    report = Report(folder, ["c"])

    report.add_batch(replace(batch(), phase_seconds={"vision": 1.5, "compile": 20.0}))
    report.add_batch(replace(batch(), phase_seconds={"vision": 0.25, "idle": 0.125}))
    report.add_batch(batch())

    assert report.as_dict()["phase_seconds"] == {"vision": 1.75, "compile": 20.0, "idle": 0.125}
    assert [run.phase_seconds.get("vision") for _, run in read_runs(folder)] == [1.5, 0.25, None]


def test_a_report_says_when_the_first_and_when_all_replicas_were_ready(folder: Path) -> None:
    report = Report(folder, ["c", "c"])

    report.add_replica(ReplicaReady(1, 1.0, (100,)))
    after_one = report.as_dict()["seconds_to"]
    report.add_replica(ReplicaReady(0, 1.0, (100,)))

    assert set(after_one) == {"first_ready"}
    told = report.as_dict()["seconds_to"]
    assert told["first_ready"] == after_one["first_ready"] <= told["all_ready"]


def test_a_line_that_a_crash_cut_short_is_passed_over(folder: Path) -> None:
    Report(folder, ["c"]).add_batch(batch())
    path = folder / STATE_FOLDER / "batches.jsonl"
    whole = path.read_text()

    path.write_text(whole + whole[: len(whole) // 2])

    assert len(list(read_runs(folder))) == 1


def test_the_last_10000_batches_are_kept_and_the_others_go(folder: Path) -> None:
    path = folder / STATE_FOLDER / "batches.jsonl"
    path.write_text("".join(f"{number}\n" for number in range(10_003)))

    trim_runs(folder)

    assert path.read_text().split() == [str(number) for number in range(3, 10_003)]
    assert list((folder / STATE_FOLDER / "tmp").iterdir()) == []


def test_few_batches_or_none_stay_as_they_are(folder: Path) -> None:
    trim_runs(folder)
    Report(folder, ["c"]).add_batch(batch())
    path = folder / STATE_FOLDER / "batches.jsonl"
    before = path.stat()

    trim_runs(folder)

    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_batches_that_cannot_be_trimmed_keep_no_run_from_its_work(folder: Path) -> None:
    path = folder / STATE_FOLDER / "batches.jsonl"
    path.write_text("{}\n" * 10_001)
    (folder / STATE_FOLDER / "tmp").rmdir()

    trim_runs(folder)

    assert len(path.read_text().split()) == 10_001


def test_a_batch_out_of_memory_is_counted_as_a_number(folder: Path) -> None:
    report = Report(folder, ["c"])

    report.add_batch(batch())

    assert json.dumps(report.as_dict()["batches"]["out_of_memory"]) == "0"


def test_figures_compare_predicted_and_measured_peaks() -> None:
    runs = [batch(100, 100)] * 19 + [batch(150, 100)] + [batch(out_of_memory=True)]

    figures = batch_figures(runs)

    assert figures["num"] == 21
    assert figures["out_of_memory"] == 1
    assert figures["prediction_error_p95"] == 0.5
    assert figures["budget_used_median"] == 0.5


def test_figures_tell_what_the_allocator_held_beyond_the_peak() -> None:
    runs = [replace(batch(peak=100), reserved_bytes=(130,))]

    assert batch_figures(runs)["reserved_beyond_peak_p95"] == 0.3


def test_a_missing_or_broken_report_is_none(folder: Path) -> None:
    assert read_report(folder) is None
    (folder / STATE_FOLDER / "report.json").write_text(json.dumps({"rows": 1})[:-2])
    assert read_report(folder) is None


def test_a_report_that_is_no_regular_file_no_object_or_too_large_is_none(folder: Path) -> None:
    path = folder / STATE_FOLDER / "report.json"

    os.mkfifo(path)
    assert read_report(folder) is None
    path.unlink()
    path.write_text("[" * 100_000)
    assert read_report(folder) is None
    path.write_text("[1]")
    assert read_report(folder) is None
    path.write_text("{}")
    os.truncate(path, 1 << 40)
    assert read_report(folder) is None


def test_batches_in_a_fifo_or_a_link_are_not_waited_for_and_not_followed(folder: Path) -> None:
    path = folder / STATE_FOLDER / "batches.jsonl"
    theirs = folder / "theirs"
    theirs.write_text("theirs")
    os.mkfifo(path)

    trim_runs(folder)
    report = Report(folder, ["c"])
    report.add_batch(batch())
    assert list(read_runs(folder)) == []
    path.unlink()
    path.symlink_to(theirs)
    report.add_batch(batch())

    assert "batches.jsonl" in report.trouble
    assert theirs.read_text() == "theirs"


def test_only_the_end_of_a_huge_file_of_batches_is_read(folder: Path) -> None:
    path = folder / STATE_FOLDER / "batches.jsonl"
    path.touch()
    os.truncate(path, 1 << 40)
    with path.open("a") as file:
        file.write("\n")

    Report(folder, ["c"]).add_batch(batch())

    assert list(read_runs(folder)) == [("c", batch())]
