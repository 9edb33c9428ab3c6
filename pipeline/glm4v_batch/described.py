"""Read back what a run says in `job.json` and the like; the parts do not depend on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4v_batch.durable import open_regular
from glm4v_batch.parts import STATE_FOLDER

_MAX_BYTES = 64 << 20


def read_description(folder: Path) -> Mapping[str, Any] | None:
    """The settings of the job that last ran in *folder*, or None where that is not known."""
    job = (read_object(folder / STATE_FOLDER / "job.json") or {}).get("job")
    return job if isinstance(job, dict) else None


def read_object(path: Path) -> Mapping[str, Any] | None:
    """The JSON object in the file *path*; None where there is none, or no regular file of sane size."""
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_BYTES + 1)
        content = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def job_name(folder: Path) -> str | None:
    """The name of the job that last ran in *folder*, or None where that is not known."""
    name = (read_description(folder) or {}).get("name")
    return name if isinstance(name, str) else None
