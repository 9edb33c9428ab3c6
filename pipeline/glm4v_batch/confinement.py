"""What a process that reads strangers' bytes may do: limits that it sets on itself, and no secrets.

They hold what a bomb, an endless loop or a crash in a decoder can cost. They are no sandbox: whoever
gets a decoder to run code of theirs runs it as this user, and can read what this user can.
"""

import ctypes
import math
import os
import resource
import sys
import time
from collections.abc import Collection
from pathlib import Path

KEPT_VARIABLES = frozenset({"PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"})
"""What a decoder keeps of the environment."""


def limit_memory(num_bytes: int) -> None:
    """Let this process's address space grow by at most *num_bytes* from here, or by less where it must.

    Does nothing but on Linux, which alone tells how large it is.
    """
    if sys.platform == "linux":
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits = (limit for limit in (soft, used_bytes + num_bytes) if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))


def forbid_files() -> None:
    """Let this process write no file. Python ignores the signal that comes with it: writing fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def leave_no_core() -> None:
    """Let this process leave no core when it crashes, which would hold records and all else in its memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def be_silent() -> None:
    """Send what libraries print nowhere: they quote what they were given, to a terminal or a log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def allow_cpu(seconds: float) -> None:
    """Have the kernel end this process by SIGXCPU when it has worked for *seconds* more, a whole number up.

    Time that passes while it waits or is stopped does not count. Each call starts anew.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + seconds)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def forget_environment(kept: Collection[str] = KEPT_VARIABLES) -> None:
    """Drop all environment variables but *kept*, also from the block that /proc/PID/environ shows."""
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    # The C library has moved what is kept elsewhere by the next line; the block itself is not read again.
    os.environ.update({name: value for name, value in os.environ.items() if name in kept})
    if sys.platform == "linux":
        _blank_environment_block()


def _blank_environment_block() -> None:
    # proc(5): env_start and env_end are fields 50 and 51; the name in field 2 may hold spaces.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    if 0 < start < end:  # both are 0 where the kernel does not tell
        ctypes.memset(start, 0, end - start)
