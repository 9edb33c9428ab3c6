"""Count what a run does, and keep what its batches measured for the next one.

`report.json` sums up the last run that did something, `batches.jsonl` has a line per batch.
Neither says what is done: only parts do.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glm4v_batch.parts import STATE_FOLDER, Part, refusing
from glm4v_batch.types import BatchRun, BatchShape, Completion, Failure, PeakSample, Result


class Report:
    """What this run has done so far. *context* names model and devices: samples of another do not apply."""

    def __init__(self, folder: Path, context: str) -> None:
        self._folder = folder / STATE_FOLDER
        self._context = context
        self._started = time.monotonic()
        self._failures: Counter[str] = Counter()
        self._runs: list[BatchRun] = []
        self._tokens: Counter[str] = Counter()
        self._num_ok = 0
        self.num_committed = 0
        self.num_failed_committed = 0

    def add_result(self, result: Result) -> None:
        """Count *result*."""
        match result:
            case Completion():
                self._num_ok += 1
                self._tokens["prompt"] += result.prompt_tokens
                self._tokens["completion"] += result.completion_tokens
            case Failure():
                self._failures[result.code] += 1

    def add_part(self, part: Part) -> None:
        """Count the rows that *part* made durable."""
        self.num_committed += part.info.num_rows
        self.num_failed_committed += part.info.num_failed

    def add_batch(self, run: BatchRun) -> None:
        """Keep what a batch measured, on disk too."""
        self._runs.append(run)
        with refusing(self._folder), (self._folder / "batches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"context": self._context, **asdict(run)}) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """The report as it goes to `report.json`."""
        seconds = time.monotonic() - self._started
        num_failed = self._failures.total()
        return {
            "context": self._context,
            "rows": {"ok": self._num_ok, "failed": num_failed, "committed": self.num_committed},
            "failures": dict(self._failures.most_common()),
            "seconds": round(seconds, 3),
            "rows_per_second": round((self._num_ok + num_failed) / seconds, 3),
            "tokens": {"prompt": self._tokens["prompt"], "completion": self._tokens["completion"]},
            "batches": batch_figures(self._runs),
        }

    def write(self) -> None:
        """Replace `report.json`, never leaving half of one."""
        temporary = self._folder / "tmp" / f"report.{os.getpid()}"
        with refusing(self._folder):
            temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(self._folder / "report.json")


def batch_figures(runs: Sequence[BatchRun]) -> dict[str, Any]:
    """How many batches ran, how large, and how near their measured peaks were to the predicted."""
    clean = [run for run in runs if not run.out_of_memory]
    figures: dict[str, Any] = {
        "num": len(runs),
        "out_of_memory": len(runs) - len(clean),
        "largest": max((run.shape.batch_size for run in clean), default=0),
    }
    measured = [run for run in clean if run.peak_bytes]
    if measured:
        errors = [
            abs(predicted - peak) / peak
            for run in measured
            for predicted, peak in zip(run.predicted_bytes, run.peak_bytes, strict=True)
        ]
        used = [max(p / b for p, b in zip(run.peak_bytes, run.budget_bytes, strict=True)) for run in measured]
        figures["prediction_error_p95"] = round(_quantile(errors, 0.95), 4)
        figures["budget_used_median"] = round(_quantile(used, 0.5), 4)
        figures["peak_bytes"] = max(max(run.peak_bytes) for run in measured)
    return figures


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def read_runs(folder: Path) -> Iterator[tuple[str, BatchRun]]:
    """The batches that `batches.jsonl` of the output *folder* remembers, each with its context.

    A last line that a crash cut short is passed over.
    """
    path = folder / STATE_FOLDER / "batches.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            run = _parse_run(line)
            if run is not None:
                yield run


def _parse_run(line: str) -> tuple[str, BatchRun] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
        context, shape = str(entry.pop("context")), BatchShape(**entry.pop("shape"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        run = BatchRun(shape=shape, **values)
        whole = len(run.peak_bytes) == len(run.predicted_bytes) == len(run.budget_bytes)
        return (context, run) if whole else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def read_samples(folder: Path, context: str) -> list[PeakSample]:
    """What earlier runs measured with the same model on the same devices."""
    return [
        PeakSample(run.shape, run.peak_bytes, run.out_of_memory)
        for theirs, run in read_runs(folder)
        if theirs == context and run.peak_bytes
    ]


def read_report(folder: Path) -> Mapping[str, Any] | None:
    """The last run's report, or None where there is none."""
    path = folder / STATE_FOLDER / "report.json"
    try:
        report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report
