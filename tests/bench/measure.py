"""Run one job through the command line, verify what it left, and work its figures out."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoConfig

from glm4v_batch.checkpoint import read_checkpoint
from glm4v_batch.images import resized_size
from glm4v_batch.report import read_report, read_runs
from glm4v_batch.types import BatchRun
from tests.bench.arithmetic import H100_FLOP_PER_SECOND, arithmetic_of
from tests.bench.inputs import work_of
from tests.bench.utilisation import Utilisation, watching

GIB = 1 << 30
_ROWS_PER_PART = 32
_SHOWN_LOG_CHARACTERS = 3000


class MeasurementError(Exception):
    """A run or what it left cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One line of the table: *num_rows* of *work* through *engine*, on so many cards (0: the CPU)."""

    work: str
    num_rows: int
    engine: str = "packed"
    cap_gib: float | None = None
    num_devices: int = 1

    @property
    def name(self) -> str:
        """A name that no other line of the table has."""
        cap = "" if self.cap_gib is None else f"-{self.cap_gib:g}gib"
        return f"{self.work}-{self.engine}-{self.num_devices}x{cap}-{self.num_rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run showed. None stands for what nobody measured.

    images_per_second           rows over the seconds from the first loaded model to the last committed part
    images_per_second_overall   rows over the seconds of the whole command
    load_seconds                from the start of the command to the first loaded model
    vision_ms … decode_ms       device time of a phase over the rows
    limit_fraction              of what the cards' arithmetic allows, from the first loaded model on
    idle_fraction               as the engine counted; idle_fraction_nvml is how often NVML saw no kernel
    """

    engine: str
    work: str
    num_devices: int
    cap_gib: float | None
    rows: int
    failed: int
    wrong_length: int
    images_per_second: float
    images_per_second_overall: float
    seconds: float
    first_part_seconds: float
    load_seconds: float
    compile_seconds: float | None
    vision_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    tflop_per_image: float
    limit_fraction: float | None
    idle_fraction: float | None
    idle_fraction_nvml: float | None
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    out_of_memory: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class _Clock:
    """When things happened, in seconds of the wall clock."""

    started: float
    ready: float
    first_part: float
    last_part: float
    ended: float


def measure(setup: Setup, model: Path, source: Path, folder: Path) -> Figures:
    """Run *setup* in a new folder below *folder*. Raises MeasurementError where it does not end well."""
    out = folder / setup.name
    shutil.rmtree(out, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    job = write_job(folder / f"{setup.name}.yaml", setup, model, source, out)
    with watching(setup.num_devices) as utilisation:
        started = time.time()
        # Rows that fail end a run with 3, and are in the table.
        _run(("run", job), out, (0, 3))
        ended = time.time()
    _run(("verify", out, "--source"), out, (0, 3))
    return figures(setup, model, out, (started, ended), utilisation)


def write_job(path: Path, setup: Setup, model: Path, source: Path, out: Path) -> Path:
    """The job of *setup*, each row's answer as long as its column says."""
    use: str | list[int] = list(range(setup.num_devices)) or "cpu"
    devices = {"use": use} | ({} if setup.cap_gib is None else {"memory_limit_gib": setup.cap_gib})
    longest = max(tokens for _, _, tokens in work_of(setup.work, setup.num_rows))
    job = {
        "name": "bench",
        "source": {"kind": "parquet", "path": f"{source}/*.parquet", "id": "id"},
        "prompt": {"user": "{question}"},
        "model": {"name": str(model)},
        "generation": {"max_new_tokens": longest, "max_new_tokens_column": "new_tokens"},
        "devices": devices,
        "batching": {"engine": setup.engine},
        "output": {"path": str(out), "rows_per_part": _ROWS_PER_PART},
    }
    path.write_text(json.dumps(job, indent=2))  # JSON is YAML
    return path


def _run(arguments: Sequence[object], out: Path, good: Sequence[int]) -> None:
    log = out.with_suffix(f".{arguments[0]}.log")
    with log.open("w") as file:
        command = [sys.executable, "-m", "glm4v_batch.cli", *map(str, arguments)]
        finished = subprocess.run(command, stdout=file, stderr=file, check=False)
    if finished.returncode not in good:
        said = log.read_text()[-_SHOWN_LOG_CHARACTERS:]
        raise MeasurementError(f"{arguments[0]} of {out.name} ended with {finished.returncode}:\n{said}")


def figures(
    setup: Setup, model: Path, out: Path, ran: tuple[float, float], utilisation: Utilisation
) -> Figures:
    """The figures of the folder *out*, whose run started and ended at *ran* on the wall clock."""
    report, rows = read_report(out), _answers(out)
    if report is None or len(rows) != setup.num_rows:
        raise MeasurementError(f"{out.name} holds {len(rows)} of {setup.num_rows} rows, or no report")
    clock, phases = _clock(out, report, *ran), report["phase_seconds"]
    working = clock.last_part - clock.ready
    flop = _flop(setup, model, rows)
    runs = [run for _, run in read_runs(out)]
    limit = setup.num_devices * H100_FLOP_PER_SECOND * working
    idle_seconds = phases.get("idle")
    return Figures(
        engine=setup.engine,
        work=setup.work,
        num_devices=setup.num_devices,
        cap_gib=setup.cap_gib,
        rows=len(rows),
        failed=sum(row["status"] == "failed" for row in rows),
        wrong_length=_wrong_lengths(setup, rows),
        images_per_second=len(rows) / working,
        images_per_second_overall=len(rows) / (clock.ended - clock.started),
        seconds=clock.ended - clock.started,
        first_part_seconds=clock.first_part - clock.started,
        load_seconds=clock.ready - clock.started,
        compile_seconds=phases.get("compile"),
        vision_ms=_ms_per_row(phases, "vision", rows),
        prefill_ms=_ms_per_row(phases, "prefill", rows),
        decode_ms=_ms_per_row(phases, "decode", rows),
        tflop_per_image=flop / len(rows) / 1e12,
        limit_fraction=flop / limit if limit else None,
        idle_fraction=None if idle_seconds is None else idle_seconds / working / max(1, setup.num_devices),
        idle_fraction_nvml=utilisation.idle_fraction(clock.ready, clock.last_part),
        peak_allocated_gib=_gib([run.peak_bytes for run in runs]),
        peak_reserved_gib=_gib([run.reserved_bytes for run in runs]),
        out_of_memory=_num_out_of_memory(runs),
        prompt_tokens=sum(row["prompt_tokens"] or 0 for row in rows),
        completion_tokens=sum(row["completion_tokens"] or 0 for row in rows),
    )


def _clock(out: Path, report: Mapping[str, Any], started: float, ended: float) -> _Clock:
    # A part's inode changes last when its temporary name goes, which is when it is committed.
    committed = [path.stat().st_ctime_ns / 1e9 for path in out.glob("part-*.parquet")]
    since = report["seconds_to"]
    begun = min(committed) - since["first_part"]
    return _Clock(started, begun + since["first_ready"], min(committed), max(committed), ended)


def _answers(out: Path) -> list[dict[str, Any]]:
    columns = ["id", "status", "prompt_tokens", "completion_tokens"]
    tables = [pq.read_table(path, columns=columns) for path in sorted(out.glob("part-*.parquet"))]
    return sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["id"]) if tables else []


def _wrong_lengths(setup: Setup, rows: Sequence[Mapping[str, Any]]) -> int:
    wanted = [tokens for _, _, tokens in work_of(setup.work, setup.num_rows)]
    pairs = zip(rows, wanted, strict=True)
    return sum(row["status"] == "ok" and row["completion_tokens"] != tokens for row, tokens in pairs)


def _flop(setup: Setup, model: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Operations for the rows that have an answer."""
    arithmetic = arithmetic_of(AutoConfig.from_pretrained(model).to_dict())
    processing = read_checkpoint(model).images
    total = 0
    for row, (width, height, new_tokens) in zip(rows, work_of(setup.work, setup.num_rows), strict=True):
        if row["status"] == "ok":
            high, wide = (side // processing.patch_size for side in resized_size(height, width, processing))
            total += arithmetic.request(high * wide, row["prompt_tokens"], new_tokens)
    return total


def _ms_per_row(phases: Mapping[str, float], name: str, rows: Sequence[object]) -> float | None:
    return 1000 * phases[name] / len(rows) if name in phases else None


def _gib(peaks: Sequence[Sequence[int]]) -> float | None:
    return max((max(peak) / GIB for peak in peaks if peak), default=None)


def _num_out_of_memory(runs: Sequence[BatchRun]) -> int:
    return sum(run.out_of_memory for run in runs)
