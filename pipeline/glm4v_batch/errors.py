"""The errors that users meet, each with its exit code.

    Glm4vBatchError            1   never raised itself
    ├── JobError               2   the command line or the job file is wrong
    ├── SourceError            4   the input is unreadable or has changed
    ├── OutputError            5   the output folder refuses
    │   └── OutputLockedError  75  another run holds it
    └── PlacementError         6   the model cannot be placed on these devices

A message says what is wrong and where; `hint` says what to do. Whatever is not one of
these is a bug and shows its traceback.
"""

from collections.abc import Sequence


class Glm4vBatchError(Exception):
    """A mistake or an obstacle that the user can act on."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class JobError(Glm4vBatchError):
    """The command line or the job file is wrong."""

    exit_code = 2

    @classmethod
    def of_mistakes(cls, where: str, mistakes: Sequence[str]) -> "JobError":
        """One error for all *mistakes* of the job file *where*, a line each."""
        if len(mistakes) == 1:
            return cls(f"{where} {mistakes[0]}")
        return cls("\n".join([f"{len(mistakes)} mistakes in {where}:", *(f"  {line}" for line in mistakes)]))


class SourceError(Glm4vBatchError):
    """The input is unreadable, or has changed since its rows were committed."""

    exit_code = 4


class OutputError(Glm4vBatchError):
    """The output folder refuses: another job's, damaged, full or read-only."""

    exit_code = 5


class OutputLockedError(OutputError):
    """Another run holds the output folder."""

    exit_code = 75


class PlacementError(Glm4vBatchError):
    """The model cannot be placed on the chosen devices."""

    exit_code = 6


class RecordError(Exception):
    """One record cannot be processed; it becomes a `Failure` with this stage and code.

    Raised where a record is read, decoded or rendered and caught where its `Failure` is made;
    it never reaches the user as an exception.
    """

    def __init__(self, stage: str, code: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.code = code

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str, str]]:
        # Exceptions cross process borders by pickle, which by default replays only `args`.
        return (RecordError, (self.stage, self.code, str(self)))
