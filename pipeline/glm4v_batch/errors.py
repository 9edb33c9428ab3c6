"""The errors that users meet, each with its exit code.

    Glm4vBatchError            1   never raised itself
    ├── JobError               2   the command line or the job file is wrong
    ├── SourceError            4   the input is unreadable or has changed
    ├── OutputError            5   the output folder refuses
    │   └── OutputLockedError  75  another run holds it
    └── PlacementError         6   the model cannot be placed on these devices, or no process started

A message says what is wrong and where; `hint` says what to do. Whatever is not one of
these is a bug and shows its traceback.
"""

import re
import traceback
import unicodedata
from collections.abc import Sequence
from pathlib import PurePath

from glm4v_batch.failure_codes import FailureCode, Stage

_MAX_MESSAGE_CHARACTERS = 200
_MAX_MISTAKES = 50
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
# From the first to the last quotation mark, because what is quoted may hold such marks itself.
_QUOTED = re.compile(r"""b?['"`].*['"`]""", re.DOTALL)


class Glm4vBatchError(Exception):
    """A mistake or an obstacle that the user can act on. It is told as `printable` text.

    *progress* says how far a run was that it ended, and is empty where none had begun.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(printable(message))
        self.hint = printable(hint)
        self.progress = ""


class JobError(Glm4vBatchError):
    """The command line or the job file is wrong."""

    exit_code = 2

    @classmethod
    def of_mistakes(cls, where: str, mistakes: Sequence[str]) -> "JobError":
        """One error for all *mistakes* of the job file *where*: their number, and the first, a line each."""
        if len(mistakes) == 1:
            return cls(f"{where} {mistakes[0]}")
        lines = [f"  {line}" for line in mistakes[:_MAX_MISTAKES]]
        if len(mistakes) > _MAX_MISTAKES:
            lines.append(f"  and {len(mistakes) - _MAX_MISTAKES} more")
        return cls("\n".join([f"{len(mistakes)} mistakes in {where}:", *lines]))


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
    """The model cannot be placed on the chosen devices, or the system gives no process what it takes."""

    exit_code = 6


class RecordError(Exception):
    """One record cannot be processed; it becomes a `Failure` with this stage and code.

    Raised where a record is read, decoded or rendered and caught where its `Failure` is made;
    it never reaches the user as an exception.
    """

    def __init__(self, stage: Stage, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.code = code

    def __reduce__(self) -> tuple[type["RecordError"], tuple[Stage, FailureCode, str]]:
        # Exceptions cross process borders by pickle, which by default replays only `args`.
        return (RecordError, (self.stage, self.code, str(self)))


def sanitise(message: str) -> str:
    """*message* as it may stand in a row or a log: on one line, without addresses, 200 characters at most.

    Control characters and those that turn the direction of writing are escaped.

    >>> sanitise("<Image at 0x7f21c0a41f90>\\n")
    '<Image at 0x…>\\\\n'
    """
    shown = "".join(map(_visible, _ADDRESS.sub("0x…", message[: 4 * _MAX_MESSAGE_CHARACTERS])))
    if len(shown) <= _MAX_MESSAGE_CHARACTERS:
        return shown
    return shown[: _MAX_MESSAGE_CHARACTERS - 1] + "…"


def said_by(error: BaseException, *, with_kind: bool = True) -> str:
    """The kind of *error* and what it says, without what it quotes: that may be a record's text or bytes.

    >>> said_by(ValueError("cannot read 'my secret' as a number"))
    'ValueError: cannot read … as a number'
    """
    said = _QUOTED.sub("…", str(error)).strip()
    if not said:
        return type(error).__name__
    return f"{type(error).__name__}: {said}" if with_kind else said


def first_line(error: BaseException, *, with_quotes: bool = False) -> str:
    """What *error* says, in one line that fits into a message.

    It quotes nothing of the data, unless *with_quotes* says that it can only quote what is not secret.

    >>> first_line(ValueError("cannot read 'my secret' as a number.\\nSee the manual."))
    'cannot read … as a number'
    """
    said = str(error).strip() if with_quotes else said_by(error, with_kind=False)
    return sanitise(said.split("\n")[0].rstrip(".") or type(error).__name__)


def place_of(error: BaseException) -> str:
    """The kind of *error* and the line of code that raised it: what of it is safe to show."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {PurePath(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def printable(text: str) -> str:
    """*text* as it may stand on a terminal: control and bidi characters escaped, line breaks kept.

    File names, columns and ids come from strangers, and a terminal obeys what it is sent.
    """
    return "\n".join(map(on_one_line, text.split("\n")))


def on_one_line(text: str) -> str:
    """As `printable`, for what is a part of a line: line breaks are escaped too.

    >>> on_one_line("part-1\\n\\x1b[2J.parquet")
    'part-1\\\\n\\\\x1b[2J.parquet'
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    # Cc controls, Cf bidi and zero-width, Cs half surrogates, Co private, Zl and Zp line breaks.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return character
