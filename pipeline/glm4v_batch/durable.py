"""Files and names as the disk promises them: synced, exclusive, or not there.

A file is durable once it is synced, its name once its folder is: these are two promises, and a name
that reaches the disk before its data is how half-written files come to be. Nothing here knows what
the files hold.
"""

import ctypes
import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

Way = Literal["link", "renameat2", "rename"]
"""How a file got its name: by `link`, by a rename that replaces nothing, or by looking first."""

# What file systems without hard links answer (vfat, many network and FUSE ones), or with a limit on them.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL}
)
_NO_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class SyncError(OSError):
    """fsync failed: the kernel may have dropped the pages, so syncing the same file again proves nothing."""


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Make the new file *path* of *data* and bring it to the disk; its name is not durable yet.

    Raises SyncError where that fails at the end, OSError before; what there is of the file stays.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* durable, as they are now. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise SyncError(error.errno, error.strerror) from error


def make_folder(folder: Path) -> None:
    """Make *folder* and what is missing above it, each name durable before the next; raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    sync_parent(folder)


def sync_parent(folder: Path) -> None:
    """Make the name of *folder* durable, unless the folder above may not be read. Raises OSError."""
    # Above a user's own folders stand some that may be passed through and not read: not of our making.
    with suppress(PermissionError):
        sync_folder(folder.resolve().parent)


def publish(temporary: Path, final: Path) -> Way:
    """Give the file *temporary* the name *final*, which nothing may have yet; how that went.

    The new name is durable once its folder is synced; after `link` the old one is still there.
    Raises FileExistsError, leaving both as they were, where *final* exists. Where the file system
    has neither links nor a rename that refuses to replace, that is looked up beforehand, which
    only holds as long as no one else writes there. Raises OSError for any other trouble.
    """
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename_new(temporary, final)
    return "link"


def _rename_new(temporary: Path, final: Path) -> Way:
    try:
        _rename_noreplace(temporary, final)
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
    else:
        return "renameat2"
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
    temporary.rename(final)
    return "rename"


def _rename_noreplace(temporary: Path, final: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # only Linux has it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(temporary), os.fsencode(final)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_NOREPLACE)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(final))


def discard(path: Path) -> None:
    """Remove the file *path* if that is possible: for what is left over when something else went wrong."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int | None:
    """The room that this user has on the file system of *folder*, in bytes; None where it does not tell.

    Quotas do not show here. Raises OSError.
    """
    found = os.statvfs(folder)
    # Some network file systems answer with zeros.
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def is_regular(path: Path) -> bool:
    """Whether *path* itself is a file, not a link to one, a folder or a pipe. Raises OSError."""
    return stat.S_ISREG(path.lstat().st_mode)


def open_regular(path: Path) -> BinaryIO:
    """The regular file *path*, opened for reading. Raises OSError, also for what is none.

    A FIFO is not waited for: whoever gives an output folder away may have put one there.
    """
    return os.fdopen(_open_at_once(path, os.O_RDONLY), "rb")


def open_to_append(path: Path) -> BinaryIO:
    """The regular file *path*, made if need be, opened to write at its end.

    Raises OSError, also for what is none, such as a link.
    """
    return os.fdopen(_open_at_once(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "ab")


def _open_at_once(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))
