"""Read an output folder, and nothing else: what is committed, what failed, how good the predictions were."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4v_batch.described import job_name
from glm4v_batch.errors import OutputError
from glm4v_batch.parts import STATE_FOLDER, Part, failed_rows, list_parts
from glm4v_batch.report import batch_figures, read_report, read_runs


@dataclass(frozen=True, slots=True)
class Status:
    """What a folder holds. *sources* counts committed rows by source, *failures* rows by error code."""

    folder: Path
    job_name: str | None
    num_parts: int
    num_ok: int
    num_failed: int
    sources: Mapping[str, int]
    failures: Mapping[str, int]
    batches: Mapping[str, Any]
    last_run: Mapping[str, Any] | None


def read_status(folder: Path) -> Status:
    """The state of *folder*. Raises OutputError where it is not an output folder or is damaged."""
    parts = list_parts(folder)
    if not parts and not (folder / STATE_FOLDER).is_dir():
        raise OutputError(f"{folder} is not an output folder of glm4v-batch: it has no parts.")
    sources: Counter[str] = Counter()
    for part in parts:
        sources[part.info.source_path] += part.info.num_rows
    return Status(
        folder=folder,
        job_name=job_name(folder),
        num_parts=len(parts),
        num_ok=sum(part.info.num_ok for part in parts),
        num_failed=sum(part.info.num_failed for part in parts),
        sources=dict(sources),
        failures=_failures(parts),
        batches=batch_figures([run for _, run in read_runs(folder)]),
        last_run=read_report(folder),
    )


def _failures(parts: list[Part]) -> dict[str, int]:
    codes: Counter[str] = Counter()
    for part in parts:
        if part.info.num_failed:
            codes.update(code for _, code in failed_rows(part))
    return dict(codes.most_common())
