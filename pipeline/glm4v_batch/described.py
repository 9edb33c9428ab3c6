"""Read back what a run says of its job in `job.json`; the parts do not depend on it."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4v_batch.parts import STATE_FOLDER

_MAX_BYTES = 64 << 20


def read_description(folder: Path) -> Mapping[str, Any] | None:
    """The settings of the job that last ran in *folder*, or None where that is not known."""
    path = folder / STATE_FOLDER / "job.json"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            return None
        job = json.loads(path.read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return job if isinstance(job, dict) else None


def job_name(folder: Path) -> str | None:
    """The name of the job that last ran in *folder*, or None where that is not known."""
    name = (read_description(folder) or {}).get("name")
    return name if isinstance(name, str) else None
