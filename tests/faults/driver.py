"""What `glm4v-batch run` does, and a line on stdout for every part that it calls committed.

The command itself says it once, at its end; power may fail after each.
"""

import os
import sys
from pathlib import Path

import pyarrow as pa

from glm4v_batch.asked import Asked
from glm4v_batch.executor import Event, Outcome
from glm4v_batch.executor import run as run_job
from glm4v_batch.job import read_job
from glm4v_batch.parts import Part, read_rows, replace
from glm4v_batch.plan import Plan, open_job


def _say(part: Part) -> None:
    os.write(1, f"committed {part.path} {part.info.num_failed}\n".encode())


def _tell(event: Event) -> None:
    match event:
        case Plan():
            for part in event.parts:
                _say(part)
        case Part():
            _say(event)
        case Outcome() if os.environ.get("FAULT_REPLACES"):
            # Each part once more, under the lock that the run still holds.
            for part in event.plan.parts:
                rows = read_rows(part)
                other = rows.set_column(1, rows.schema.field(1), pa.array(["another answer"] * len(rows)))
                _say(replace(part.path.parent, other, part.info, part))


def main() -> None:
    """Run the job file of the first argument, with the setting of the third and those of the environment."""
    opened = open_job(read_job(Path(sys.argv[1]), [*sys.argv[3:], *os.environ.get("FAULT_SETS", "").split()]))
    for event in run_job(opened, Asked(redo_changed="FAULT_REDOES" in os.environ)):
        _tell(event)


if __name__ == "__main__":
    main()
