"""The files that `source.path` names: all of them, or an error, for what is left out is never annotated.

On this machine folders are walked here: fsspec leaves out what it cannot list, and takes a `[` for the
beginning of a pattern where it is a folder's name.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

# Whether to enter a folder, by its level below where the walk begins and its name.
_Enters = Callable[[int, str], bool]


def find_files(settings: ParquetSettings, own_output: Path | None) -> tuple[Any, dict[str, str]]:
    """The file system of `source.path`, and the files it finds there by the name that we call them.

    Parts of *own_output* do not count: an output below its source would feed on itself. Raises
    JobError for a path of no known kind, SourceError where there is nothing, or something that cannot be
    listed or opened.
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
        return list(_expand_elsewhere(fs, path))
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{pattern} cannot be looked for: the names of files under this locale are in {error.encoding}.",
            hint="Set a locale of UTF-8 (LC_ALL=C.UTF-8).",
        ) from None
    except ValueError as error:  # ** beside something else
        raise JobError(f"source.path {pattern} is no pattern: {error}.") from None
    except OSError as error:
        raise _unlisted(pattern, error) from None


def _expand_here(path: str, pattern: str) -> Iterator[str]:
    mode = _mode(path)
    if stat.S_ISREG(mode):
        yield path
    elif stat.S_ISDIR(mode):
        yield from (file for file in _files_below(path) if file.endswith(".parquet"))
    elif _WILDCARD.search(pattern):
        root, rest = _split(path, pattern)
        matches = re.compile(glob_translate(rest)).match
        files = _files_below(root, _way_in(rest), with_hidden=_names_hidden(rest))
        yield from (file for file in files if matches(file[len(root) :].lstrip("/")))


def _mode(path: str) -> int:
    """The kind and permissions of what stands at *path*; 0 where nothing does.

    Raises OSError where the system does not tell, which `Path.is_file` of Python 3.14 takes for a no.
    """
    try:
        return Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _expand_elsewhere(fs: Any, path: str) -> Iterator[str]:
    if fs.isfile(path):
        yield path
    elif fs.isdir(path):
        start = len(path.rstrip("/").split("/")) if path else 0
        files = (file for file in fs.find(path) if file.endswith(".parquet"))
        yield from (file for file in files if not _names_hidden(_from(file, start)))
    else:
        start = _first_wildcard(path.split("/"))
        with_hidden = _names_hidden(_from(path, start))
        files = (file for file in fs.glob(path) if fs.isfile(file))
        yield from (file for file in files if with_hidden or not _names_hidden(_from(file, start)))


def _from(path: str, start: int) -> str:
    return "/".join(path.split("/")[start:])


def _first_wildcard(parts: Sequence[str]) -> int:
    return next((n for n, part in enumerate(parts) if _WILDCARD.search(part)), len(parts) - 1)


def _split(path: str, pattern: str) -> tuple[str, str]:
    """*path* before and from the first part of *pattern* on that holds a wildcard.

    Its beginning may be the current folder, whose name is no pattern whatever it looks like.
    """
    parts = pattern.split("/")
    of_path = path.split("/")
    start = len(of_path) - (len(parts) - _first_wildcard(parts))
    return "/".join(of_path[:start]) or "/", "/".join(of_path[start:])


def _names_hidden(path: str) -> bool:
    return any(part.startswith(_HIDDEN) for part in path.split("/"))


def _way_in(pattern: str) -> _Enters:
    """Which folders can hold what matches *pattern*: others may be large, or somebody else's."""
    parts = pattern.split("/")
    most = parts.index("**") if "**" in parts else len(parts) - 1
    matches = [re.compile(glob_translate(part)).match for part in parts[:most]]

    def enters(level: int, name: str) -> bool:
        return bool(matches[level](name)) if level < most else "**" in parts

    return enters


def _any_folder(_level: int, _name: str) -> bool:
    return True


def _files_below(root: str, enters: _Enters = _any_folder, *, with_hidden: bool = False) -> Iterator[str]:
    """The files below *root*, in folders that *enters* says. Raises OSError for one that cannot be listed.

    Folders that are links are not entered: they may lead in circles, or to files that are found already.
    """
    for folder, folders, files in os.walk(root, onerror=_raise_unless_gone):
        level = len(Path(folder).relative_to(root).parts)
        shown = (name for name in folders if with_hidden or not name.startswith(_HIDDEN))
        folders[:] = [name for name in shown if name != _LOST_AND_FOUND and enters(level, name)]
        names = (name for name in files if with_hidden or not name.startswith(_HIDDEN))
        yield from (f"{folder.rstrip('/')}/{name}" for name in names)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _whole(found: Iterable[str]) -> list[str]:
    """*found* without what is no file: a FIFO would hang. Raises SourceError for links that lead nowhere."""
    modes = {file: _mode(file) for file in found}
    lost = [file for file, mode in modes.items() if not mode and Path(file).is_symlink()]
    if lost:
        lines = [f"  {sanitise(file)}" for file in lost]
        raise SourceError(
            "\n".join(["These files are links that lead nowhere:", *lines]),
            hint="Bring back what they lead to, a mounted disk perhaps, or remove them.",
        )
    return [file for file, mode in modes.items() if stat.S_ISREG(mode)]


def _unlisted(pattern: str, error: OSError) -> SourceError:
    what = sanitise(os.fsdecode(error.filename)) if error.filename else pattern
    is_forbidden = isinstance(error, PermissionError)
    hint = (
        "Mend its permissions for the user who runs this, or name what may be read." if is_forbidden else ""
    )
    return SourceError(f"{what} cannot be listed: {error.strerror or first_line(error)}.", hint=hint)


def _nothing(pattern: str, *, is_all_output: bool) -> SourceError:
    if is_all_output:
        return SourceError(
            f"{pattern} finds no files but those in output.path, which are never a source.",
            hint="Bring the input back, or keep output.path out of its folder.",
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
