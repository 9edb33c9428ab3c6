"""Count what a run does, and keep what its batches measured for the next one.

`report.json` sums up the last run that did something, `batches.jsonl` has a line per batch.
Neither says what is done: only parts do.
"""

import json
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from glm4v_batch.described import read_object
from glm4v_batch.devices import DeviceUse
from glm4v_batch.durable import open_regular, open_to_append
from glm4v_batch.parts import STATE_FOLDER, Part
from glm4v_batch.retry import Replaced
from glm4v_batch.speed import TimeEstimate
from glm4v_batch.types import (
    BatchRun,
    BatchShape,
    Completion,
    Failure,
    ReplicaLost,
    ReplicaReady,
    Result,
)

_MEMORY_OF_RUNS = 10_000
_MAX_RUNS_BYTES = 64 << 20


class Report:
    """What this run has done so far.

    *contexts* name, per replica, model and devices: samples of another context do not apply.
    *expected* is what the plan said of the time for *num_expected* rows, None where nobody knew how many.
    Where it cannot be kept on disk, `trouble` says why.
    """

    def __init__(
        self,
        folder: Path,
        contexts: Sequence[str],
        expected: TimeEstimate | None = None,
        num_expected: int | None = None,
    ) -> None:
        self._folder = folder / STATE_FOLDER
        self._contexts = contexts
        self._expected = expected
        self._num_expected = num_expected
        self._ready: list[ReplicaReady] = []
        self._lost: list[ReplicaLost] = []
        self._uses: dict[int, _Use] = {}
        self._started = time.monotonic()
        self._seconds_to: dict[str, float] = {}
        self._phase_seconds: defaultdict[str, float] = defaultdict(float)
        self._failures: Counter[str] = Counter()
        # A night has hundreds of thousands of batches; the last ones tell as much.
        self._runs: deque[BatchRun] = deque(maxlen=_MEMORY_OF_RUNS)
        self._num_batches: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._num_ok = 0
        self.num_committed = 0
        self.num_failed_committed = 0
        self.trouble = ""

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
        self._note("first_part")
        self.num_committed += part.info.num_rows
        self.num_failed_committed += part.info.num_failed

    def _note(self, milestone: str) -> None:
        self._seconds_to.setdefault(milestone, time.monotonic() - self._started)

    def add_replaced(self, replaced: Replaced) -> None:
        """Count the rows that were done again and are durable."""
        self.num_committed += replaced.num_rows
        self.num_failed_committed += replaced.part.info.num_failed - replaced.old.info.num_failed

    def add_batch(self, run: BatchRun) -> None:
        """Keep what a batch measured, on disk too."""
        self._runs.append(run)
        self._num_batches.update(num=1, out_of_memory=int(run.out_of_memory))
        for phase, seconds in run.phase_seconds.items():
            self._phase_seconds[phase] += seconds
        line = json.dumps({"context": self._contexts[run.replica], **asdict(run)})
        with self._tolerating(), open_to_append(self._folder / "batches.jsonl") as file:
            file.write(f"{line}\n".encode())

    def add_replica(self, event: ReplicaReady | ReplicaLost) -> None:
        """Count a replica that came or went."""
        match event:
            case ReplicaReady():
                self._ready.append(event)
                self._note("first_ready")
                if len(self._ready) == len(self._contexts):
                    self._note("all_ready")
            case ReplicaLost():
                self._lost.append(event)

    def add_uses(self, uses: Sequence[DeviceUse]) -> None:
        """Count what the devices were seen doing."""
        for use in uses:
            self._uses.setdefault(use.index, _Use()).add(use)

    def as_dict(self) -> dict[str, Any]:
        """The report as it goes to `report.json`."""
        seconds = time.monotonic() - self._started
        num_failed = self._failures.total()
        return {
            "contexts": list(self._contexts),
            "rows": {"ok": self._num_ok, "failed": num_failed, "committed": self.num_committed},
            "failures": dict(self._failures.most_common()),
            "seconds": round(seconds, 3),
            "seconds_to": {name: round(value, 3) for name, value in self._seconds_to.items()},
            "phase_seconds": {name: round(value, 3) for name, value in self._phase_seconds.items()},
            "rows_per_second": round((self._num_ok + num_failed) / seconds, 3),
            "tokens": {"prompt": self._tokens["prompt"], "completion": self._tokens["completion"]},
            "batches": {**batch_figures(self._runs), **self._counted_batches()},
            "replicas": self._replicas(),
            "devices": [{"index": index, **use.as_dict()} for index, use in sorted(self._uses.items())],
            "plan": self._plan(seconds),
        }

    def _counted_batches(self) -> dict[str, int]:
        return {key: self._num_batches[key] for key in ("num", "out_of_memory")}

    def _replicas(self) -> dict[str, Any]:
        return {
            "num": len(self._contexts),
            "load_seconds": round(max((event.seconds for event in self._ready), default=0.0), 3),
            "lost": [asdict(event) for event in self._lost],
        }

    def _plan(self, seconds: float) -> dict[str, Any] | None:
        """What the plan said of the time for all that was left, and what passed until all was done."""
        if self._expected is None:
            return None
        is_done = self.num_committed >= (self._num_expected or 0)
        return {**asdict(self._expected), "actual_seconds": round(seconds, 3) if is_done else None}

    def write(self) -> None:
        """Replace `report.json`, never leaving half of one."""
        temporary = self._folder / "tmp" / f"report.{os.getpid()}"
        with self._tolerating():
            temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(self._folder / "report.json")

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        # Parts say what is done: without its figures a run is no less complete.
        try:
            yield
        except OSError as error:
            self.trouble = self.trouble or f"{error.filename or self._folder}: {error.strerror or error}"


class _Use:
    """What one device was seen doing, summed up."""

    def __init__(self) -> None:
        self._peak_bytes = 0
        self._num_looks = 0
        self._utilisation_sum = 0.0

    def add(self, use: DeviceUse) -> None:
        self._peak_bytes = max(self._peak_bytes, use.used_bytes)
        if use.utilisation is not None:
            self._num_looks += 1
            self._utilisation_sum += use.utilisation

    def as_dict(self) -> dict[str, Any]:
        mean = round(self._utilisation_sum / self._num_looks, 3) if self._num_looks else None
        return {"peak_used_bytes": self._peak_bytes, "utilisation_mean": mean}


def batch_figures(runs: Collection[BatchRun]) -> dict[str, Any]:
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
        figures["reserved_beyond_peak_p95"] = round(_quantile(list(_beyond_peak(measured)), 0.95), 4)
    return figures


def _beyond_peak(runs: Sequence[BatchRun]) -> Iterator[float]:
    """What the allocator held beyond its live tensors at the worst: its cache, and what is fragmented."""
    for run in runs:
        for reserved, peak in zip(run.reserved_bytes or run.peak_bytes, run.peak_bytes, strict=True):
            yield reserved / peak - 1


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def read_runs(folder: Path) -> Iterator[tuple[str, BatchRun]]:
    """The batches that `batches.jsonl` of the output *folder* remembers, each with its context.

    A last line that a crash cut short is passed over, and so is all but the last 64 MiB.
    """
    try:
        file = open_regular(folder / STATE_FOLDER / "batches.jsonl")
    except OSError:
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _MAX_RUNS_BYTES))
        for line in file:
            run = _parse_run(line)
            if run is not None:
                yield run


def trim_runs(folder: Path) -> None:
    """Let `batches.jsonl` of the output *folder*, which this process must hold, keep its last lines only.

    Every run reads it whole, and it would grow for ever.
    """
    path = folder / STATE_FOLDER / "batches.jsonl"
    temporary = path.with_name("tmp") / f"batches.{os.getpid()}"
    # Only tidying: what keeps it from being done must not keep the run from its work.
    with suppress(OSError):
        with open_regular(path) as file:
            num_lines = sum(1 for _ in file)
        if num_lines <= _MEMORY_OF_RUNS:
            return
        with open_regular(path) as file, temporary.open("wb") as kept:
            kept.writelines(islice(file, num_lines - _MEMORY_OF_RUNS, None))
        temporary.replace(path)


def _parse_run(line: bytes) -> tuple[str, BatchRun] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
        context, shape = str(entry.pop("context")), BatchShape(**entry.pop("shape"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        run = BatchRun(shape=shape, **values)
        whole = len(run.peak_bytes) == len(run.predicted_bytes) == len(run.budget_bytes)
        return (context, run) if whole else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def read_report(folder: Path) -> Mapping[str, Any] | None:
    """The last run's report, or None where there is none."""
    return read_object(folder / STATE_FOLDER / "report.json")
