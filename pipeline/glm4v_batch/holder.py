"""Who holds an output folder: what the kernel says of its lock file, and what its holder wrote there.

Trying the lock would tell as well, and could make a run that starts at this moment give up.
"""

import os
from pathlib import Path

from glm4v_batch.durable import open_regular
from glm4v_batch.errors import sanitise
from glm4v_batch.parts import STATE_FOLDER

_UNKNOWN = "owner unknown"


def lock_path(folder: Path) -> Path:
    """The file whose lock is the hold on *folder*."""
    return folder / STATE_FOLDER / "lock"


def lock_holder(folder: Path) -> str | None:
    """The run that holds *folder* now, or None where none does."""
    try:
        with open_regular(lock_path(folder)) as file:
            written, pids = _written(file.fileno()), _holding(file.fileno())
    except OSError:
        return None
    if pids is None:
        return written or None  # the text goes when a run ends by itself
    return _named(written, pids) if pids else None


def holder_of(descriptor: int) -> str:
    """The run that holds the open lock file *descriptor*, for whom it has refused."""
    return _named(_written(descriptor), _holding(descriptor) or [])


def _written(descriptor: int) -> str:
    return sanitise(os.pread(descriptor, 1000, 0).decode(errors="replace"))


def _named(written: str, pids: list[int]) -> str:
    # What is written may be of one that was killed, and nothing yet by one that has just come.
    known = [f"process {pid}" for pid in pids if pid > 0]  # one of another container has no number here
    if not known or any(written.startswith(f"{process} ") for process in known):
        return written or _UNKNOWN
    return known[0]


def _holding(descriptor: int) -> list[int] | None:
    """The processes that the kernel says hold the lock; None where only Linux would say."""
    about = os.fstat(descriptor)
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # 1: FLOCK  ADVISORY  WRITE 4711 fd:01:131074 0 EOF; who waits has an arrow before FLOCK.
    fields = [line.split() for line in locks]
    held = [(each[5], int(each[4])) for each in fields if each[1] == "FLOCK"]
    device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
    if _is_mounted(about.st_dev):
        return [pid for place, pid in held if place == f"{device}:{about.st_ino}"]
    return [pid for place, pid in held if place.endswith(f":{about.st_ino}")]


def _is_mounted(device: int) -> bool:
    """Whether the kernel names *device* among its mounts: a subvolume of btrfs has one for `stat` only."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split()[2] == f"{os.major(device)}:{os.minor(device)}" for line in mounts)
