"""The files that `source.path` names: all of them, or an error, for what is left out is never annotated.

On this machine folders are walked here: fsspec leaves out what it cannot list, and takes a `[` for the
beginning of a pattern where it is a folder's name.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from glm4v_batch.errors import Glm4vBatchError, JobError, SourceError, first_line, sanitise
from glm4v_batch.job import ParquetSettings

_WILDCARD = re.compile(r"[*?\[]")
# Names that begin so are other programs' state, our own output folders' among them.
_HIDDEN = (".", "_")
# Where a check of a file system puts what it finds. Only root may look into it.
_LOST_AND_FOUND = "lost+found"


def find_files(settings: ParquetSettings, own_output: Path | None) -> tuple[Any, dict[str, str]]:
    """The file system of `source.path`, and the files it finds there by the name that we call them.

    Parts of *own_output* do not count: an output below its source would feed on itself. Raises
    JobError for a path of no known kind and for one that finds nothing but the output, SourceError
    where there is nothing, or something that cannot be listed or opened.
    """
    fs, path = file_system(settings.path)
    found = _expand(fs, path, settings.path)
    files = [file for file in found if not _is_below(fs, file, own_output)]
    if not files:
        raise _nothing(settings.path, is_all_output=bool(found))
    named = {_name(fs, file, settings.path): file for file in files}
    _refuse_bytes(named)
    return fs, dict(sorted(named.items()))


def is_local(settings: ParquetSettings) -> bool:
    """Whether the files of *settings* lie on this machine."""
    try:
        return isinstance(file_system(settings.path)[0], LocalFileSystem)
    except Glm4vBatchError:
        return False


def file_system(pattern: str) -> tuple[Any, str]:
    """The file system of *pattern* and the path in it; nothing is listed.

    Raises JobError for a kind that is not known, SourceError for one that cannot be opened.
    """
    try:
        fs, path = fsspec.url_to_fs(pattern)
    except (ValueError, ImportError) as error:
        raise JobError(f"source.path {pattern} cannot be opened: {error}.") from None
    except OSError as error:  # an archive that holds the files, say
        raise SourceError(f"{pattern} cannot be opened: {first_line(error)}.") from None
    return fs, path


def _expand(fs: Any, path: str, pattern: str) -> list[str]:
    try:
        if isinstance(fs, LocalFileSystem):
            return _whole(_expand_here(re.sub("//+", "/", path), re.sub("//+", "/", pattern.rstrip("/"))))
        return _expand_elsewhere(fs, path, pattern)
    except ValueError as error:  # ** beside something else
        raise JobError(f"source.path {pattern} is no pattern: {error}.") from None
    except OSError as error:
        raise _unlisted(pattern, error) from None


def _expand_here(path: str, pattern: str) -> Iterator[str]:
    if Path(path).is_file():
        yield path
    elif Path(path).is_dir():
        yield from (file for file in _files_below(path) if file.endswith(".parquet"))
    elif _WILDCARD.search(pattern):
        root, rest = _split(path, pattern)
        matches = re.compile(glob_translate(rest)).match
        levels = None if "**" in rest else rest.count("/") + 1
        files = _files_below(root, levels, with_hidden=_names_hidden(rest))
        yield from (file for file in files if matches(file[len(root) :].lstrip("/")))
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            Path(path).stat()  # says so where it may not be looked at


def _expand_elsewhere(fs: Any, path: str, pattern: str) -> list[str]:
    if fs.isfile(path):
        return [path]
    if fs.isdir(path):
        root, with_hidden = path.rstrip("/"), False
        found = fs.glob(f"{root}/**/*.parquet")
    else:
        root, rest = _split(path, pattern.split("::")[0].rstrip("/"))
        with_hidden = _names_hidden(rest)
        found = [file for file in fs.glob(path) if fs.isfile(file)]
    return [file for file in found if with_hidden or not _names_hidden(file[len(root) :].lstrip("/"))]


def _split(path: str, pattern: str) -> tuple[str, str]:
    """*path* before and from the first part of *pattern* on that holds a wildcard.

    Its beginning may be the current folder, whose name is no pattern whatever it looks like.
    """
    parts = pattern.split("/")
    first = next((n for n, part in enumerate(parts) if _WILDCARD.search(part)), len(parts) - 1)
    of_path = path.split("/")
    start = len(of_path) - (len(parts) - first)
    return "/".join(of_path[:start]) or "/", "/".join(of_path[start:])


def _names_hidden(path: str) -> bool:
    return any(part.startswith(_HIDDEN) for part in path.split("/"))


def _files_below(root: str, levels: int | None = None, *, with_hidden: bool = False) -> Iterator[str]:
    """The files at most *levels* below *root*. Raises OSError for a folder that cannot be listed.

    Folders that are links are not entered: they may lead in circles, or to files that are found already.
    """
    for folder, folders, files in os.walk(root, onerror=_raise_unless_gone):
        is_deepest = folder[len(root) :].strip("/").count("/") + (folder != root) + 1 == levels
        shown = [] if is_deepest else [name for name in folders if name != _LOST_AND_FOUND]
        folders[:] = [name for name in shown if with_hidden or not name.startswith(_HIDDEN)]
        names = (name for name in files if with_hidden or not name.startswith(_HIDDEN))
        yield from (f"{folder.rstrip('/')}/{name}" for name in names)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _whole(found: Iterable[str]) -> list[str]:
    """*found* without what is no file: a FIFO would hang. Raises SourceError for links that lead nowhere."""
    files = list(found)
    lost = [file for file in files if os.path.islink(file) and not Path(file).exists()]  # noqa: PTH114
    if lost:
        lines = [f"  {sanitise(file)}" for file in lost]
        raise SourceError(
            "\n".join(["These files are links that lead nowhere:", *lines]),
            hint="Bring back what they lead to, a mounted disk perhaps, or remove them.",
        )
    return [file for file in files if Path(file).is_file()]


def _unlisted(pattern: str, error: OSError) -> SourceError:
    what = sanitise(os.fsdecode(error.filename)) if error.filename else pattern
    is_forbidden = isinstance(error, PermissionError)
    hint = (
        "Mend its permissions for the user who runs this, or name what may be read." if is_forbidden else ""
    )
    return SourceError(f"{what} cannot be listed: {error.strerror or first_line(error)}.", hint=hint)


def _nothing(pattern: str, *, is_all_output: bool) -> Glm4vBatchError:
    if is_all_output:
        return JobError(
            f"All that source.path {pattern} finds lies in output.path, whose files are never a source: "
            "choose another output.path."
        )
    return SourceError(
        f"{pattern} finds no Parquet files.",
        hint="source.path is a file, a glob, or a folder that holds *.parquet; it is relative to the "
        "current folder.",
    )


def _refuse_bytes(named: Mapping[str, str]) -> None:
    # Python stands in half a surrogate pair for a byte of a file's name that is no text.
    unnamed = [name for name in named if any("\ud800" <= character <= "\udfff" for character in name)]
    if unnamed:
        lines = [f"  {sanitise(name)} has a name that is not UTF-8" for name in unnamed]
        raise SourceError(
            "\n".join(["These files cannot be named in an output:", *lines]), hint="Rename them."
        )


def _is_below(fs: Any, file: str, folder: Path | None) -> bool:
    if folder is None or not isinstance(fs, LocalFileSystem):
        return False
    return Path(file).resolve().is_relative_to(folder.resolve())


def _name(fs: Any, path: str, pattern: str) -> str:
    if not isinstance(fs, LocalFileSystem):
        return str(fs.unstrip_protocol(path))
    is_relative = "://" not in pattern and not pattern.startswith(("/", "~"))
    return os.path.relpath(path) if is_relative else path
