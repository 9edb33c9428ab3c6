"""The shim sees what the kernel sees: without this, F1 and F2 could miss what they do not count."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, command
from tests.faults.harness import Scene, environment, out, undisturbed

CALLS = {
    "mkdir": "mkdir", "mkdirat": "mkdir", "fsync": "fsync", "fdatasync": "fsync", "link": "link",
    "linkat": "link", "rename": "rename", "renameat": "rename", "renameat2": "rename", "unlink": "unlink",
    "unlinkat": "unlink", "rmdir": "unlink", "ftruncate": "truncate", "truncate": "truncate",
    "write": "write", "pwrite64": "write", "writev": "write", "pwritev": "write", "pwritev2": "write",
    "copy_file_range": "write", "sendfile": "write", "fallocate": "truncate", "symlink": "link",
    "symlinkat": "link", "mknodat": "create",
}  # fmt: skip


def seen_by_the_kernel(scene: Scene, disk: Path) -> Counter[str]:
    """Every successful call of the driver and all its children that changes *disk*, by kind."""
    log = disk.with_suffix(".strace")
    # A file for each thread: in one for all, calls that overlap stand in two halves.
    traced = ["strace", "-ff", "-y", "-o", str(log), "-e", f"trace=openat,open,creat,{','.join(CALLS)}"]
    arguments = ["run", scene.job, "--set", f"output.path={out(disk)}"]
    subprocess.run([*traced, *command(*arguments)], cwd=ROOT, env=environment(scene), capture_output=True)
    counts: Counter[str] = Counter()
    lines = (line for file in log.parent.glob(f"{log.name}.*") for line in file.read_text().splitlines())
    for line in lines:
        found = re.match(r"(\w+)\((.*)\) += \d", line)
        if found and str(disk) in found[2]:
            name = found[1]
            if name in CALLS:
                counts[CALLS[name]] += 1
            elif "O_CREAT" in found[2] or "O_TRUNC" in found[2]:
                counts["open"] += 1
    return counts


def test_the_shim_counts_what_strace_sees(scene: Scene) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    counted = Counter(change.kind for _, change in undisturbed(scene))

    seen = seen_by_the_kernel(scene, scene.disk("traced"))

    seen_opens = seen.pop("open")
    assert {kind: seen[kind] for kind in counted if kind != "create"} == {
        kind: count for kind, count in counted.items() if kind != "create"
    }
    # Opening the lock or the list of batches again may create and does not.
    assert counted["create"] <= seen_opens
