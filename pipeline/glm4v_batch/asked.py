"""What the command line asks of a run, in a module that is imported before anything slow."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a run, beside what the job file says: nothing means all rows that no part holds.

    *limit* counts rows of the source from its beginning. With *redo_changed* the parts of a source
    that has changed give way to its new rows; without, it is refused. *retry* names the codes of the
    failed rows to do again, none of them meaning all codes; new rows are then not done. None: no retry.
    """

    limit: int | None = None
    redo_changed: bool = False
    retry: frozenset[str] | None = None


EVERYTHING = Asked()
"""All rows that no part holds."""
