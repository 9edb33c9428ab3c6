"""The output folder: one run at a time, one job for ever, and every chunk whole or not there.

Results arrive in any order; `Output` holds those of a chunk until the last one is there and
commits them together. What is committed is what the parts' footers say; nothing else is kept.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from glm4v_batch.child import end_while_importing
from glm4v_batch.durable import make_folder, open_regular, sync_folder, sync_parent, write_synced
from glm4v_batch.errors import OutputError, OutputLockedError
from glm4v_batch.holder import holder_of, lock_path
from glm4v_batch.parts import (
    RESULT_FIELDS,
    STATE_FOLDER,
    Part,
    PartInfo,
    check_name,
    check_room,
    commit,
    differing_keys,
    list_parts,
    refusing,
)
from glm4v_batch.types import Chunk, Completion, Failure, Record, Result

# What a row takes on the disk until the first part tells: answers are a few hundred bytes.
_ROW_BYTES = 2048


def fingerprint(settings: Mapping[str, Any]) -> str:
    """The hash that names a job's output: of every setting that can change the text."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Lock:
    """This process's hold on *folder*, by the open lock file *descriptor*."""

    folder: Path
    descriptor: int

    def check(self) -> None:
        """Raise OutputError where the folder has been removed, moved or taken over since it was locked.

        The kernel locks a file, not its name: once another file stands there, the lock keeps no one out.
        """
        with refusing(self.folder):
            there = lock_path(self.folder).stat()
        if not os.path.samestat(there, os.fstat(self.descriptor)):
            raise OutputLockedError(
                f"{self.folder} is not this run's any more: its lock file was replaced.",
                hint="Another run may be at work there. See that only one is, then run this command again.",
            )


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold *folder*, made if need be, for this process.

    The lock is the kernel's and goes with the process, so that kill -9 leaves none behind. What is
    listed in *folder* from here on is durable: a run that died may have left a name in memory only.
    A folder that was made for it goes again where no work was begun: the job may turn out to be wrong.
    Raises OutputLockedError where another run has it, OutputError where it cannot be named or written.
    """
    end_while_importing()  # or the program's own run would refuse it, in the child, and seem to be another's
    check_name(folder)
    with refusing(folder):
        is_new = not folder.exists()
    descriptor = _open_lock(folder)
    try:
        lock = Lock(folder, descriptor)
        _take(lock)
        try:
            with refusing(folder):
                _remove_leftovers(folder)
                sync_parent(folder)
                sync_folder(folder)
            yield lock
        finally:
            _leave(lock, is_new=is_new)
    finally:
        os.close(descriptor)


def _open_lock(folder: Path) -> int:
    state = folder / STATE_FOLDER
    with refusing(folder):
        try:
            if not folder.is_dir():
                make_folder(folder)
            for own in (state, state / "tmp"):
                _refuse_link(own)
                own.mkdir(exist_ok=True)
            _refuse_link(lock_path(folder))
        except (FileExistsError, NotADirectoryError) as error:
            raise OutputError(
                f"{folder} cannot be used as an output folder: {error.filename} is not a folder.",
                hint="Choose another output.path.",
            ) from None
        return os.open(lock_path(folder), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _refuse_link(path: Path) -> None:
    # What comes with a folder from elsewhere must not make us write or remove files beyond it.
    if path.is_symlink():
        raise OutputError(
            f"{path} is a link, and what it leads to is not ours to write or remove.",
            hint="Remove the link and run this command again, or choose another output.path.",
        )


def _take(lock: Lock) -> None:
    with refusing(lock.folder):
        _flock(lock)
    lock.check()
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    _write_owner(lock, f"process {os.getpid()} on {socket.gethostname()} since {since}")


def _flock(lock: Lock) -> None:
    try:
        fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputLockedError(
            f"{lock.folder} is held by another run: {holder_of(lock.descriptor)}.",
            hint="Wait for it to end, or stop it; what it has committed stays.",
        ) from None


def _write_owner(lock: Lock, owner: str) -> None:
    # For people only: the kernel knows who holds the lock, so a full disk does not matter here.
    with suppress(OSError):
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, owner.encode(), 0)


def _leave(lock: Lock, *, is_new: bool) -> None:
    # What cannot be tidied up now is tidied up by the next run: it is no reason to call this one failed.
    with suppress(OutputError, OSError):
        lock.check()
        _remove_leftovers(lock.folder)
        _write_owner(lock, "")
        state = lock.folder / STATE_FOLDER
        if is_new and {path.name for path in state.iterdir()} == {"lock", "tmp"}:
            (state / "tmp").rmdir()
            lock_path(lock.folder).unlink()
            state.rmdir()
            lock.folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    # Only ever under the lock: without it they might be another run's.
    temporary = folder / STATE_FOLDER / "tmp"
    _refuse_link(temporary.parent)
    _refuse_link(temporary)
    for path in temporary.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def _remove_tree(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # It names what is inside by its last name alone, which says nothing from here.
        raise OSError(error.errno, error.strerror, str(folder)) from error


def offload_folder(folder: Path, replica: int) -> Path:
    """Where *replica* may keep weights that do not fit elsewhere; it goes with what else is temporary."""
    return folder / STATE_FOLDER / "tmp" / f"offload-{replica}"


def describe(folder: Path, job: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Leave `job.json` for people and `verify` to read; the parts do not depend on it."""
    body = {"job": job, "fingerprint": fingerprint(settings), "settings": settings}
    state = folder / STATE_FOLDER
    temporary = state / "tmp" / f"job.{os.getpid()}"
    content = (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()
    path = state / "job.json"
    with suppress(OSError), open_regular(path) as file:
        if file.read() == content:
            return
    with refusing(folder):
        write_synced(temporary, content)
        temporary.replace(path)


def committed_parts(folder: Path, settings: Mapping[str, Any]) -> list[Part]:
    """The parts of *folder*, all of them of the job with *settings*.

    Raises OutputError where a part belongs to another job, naming the settings that differ.
    """
    wanted = fingerprint(settings)
    parts = list_parts(folder)
    for part in parts:
        if part.info.fingerprint != wanted:
            raise OutputError(
                f"{folder} belongs to another job: {_differences(part.info.settings, settings)}.",
                hint=f"Run 'glm4v-batch status {folder}' to see it, or choose another output.path.",
            )
    return parts


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    keys = differing_keys(theirs, ours)
    return "; ".join(f"{key} was {_shown(theirs.get(key))} and is {_shown(ours.get(key))}" for key in keys)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(slots=True)
class _OpenChunk:
    chunk: Chunk
    source: Mapping[str, str | int]
    passed: dict[int, pa.Table] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)


class Output:
    """Collects results and commits each chunk as one part once its last row is there.

    *lock* is the hold on its folder; *settings* make the fingerprint; *passed_fields* are the
    source's columns to pass through.
    """

    def __init__(self, lock: Lock, settings: Mapping[str, Any], passed_fields: Sequence[pa.Field]) -> None:
        self._lock = lock
        self._settings = settings
        self._fingerprint = fingerprint(settings)
        self._passed = pa.schema(passed_fields)
        self._open: dict[str, _OpenChunk] = {}
        self._num_bytes = 0
        self._num_rows = 0

    def __len__(self) -> int:
        """Chunks that are begun and not committed: what a crash would lose."""
        return len(self._open)

    def begin(self, chunk: Chunk, source: Mapping[str, str | int]) -> None:
        """Expect the rows of *chunk*, whose shard has the identity *source*.

        Raises OutputError where the disk has no room for it beside those that are begun already.
        """
        self._open[chunk.chunk_id] = _OpenChunk(chunk, source)
        row_bytes = self._num_bytes / self._num_rows if self._num_rows else _ROW_BYTES
        num_rows = sum(begun.chunk.num_rows for begun in self._open.values())
        check_room(self._lock.folder, round(num_rows * row_bytes))

    def expect(self, chunk: Chunk, record: Record) -> None:
        """Keep what passes through of *record* until its chunk is whole."""
        if record.passed is not None:
            self._open[chunk.chunk_id].passed[record.row] = record.passed

    def add(self, result: Result) -> Part | None:
        """Take a result in; the part that it completes, once that is durable, or None."""
        chunk = self._open[result.chunk_id]
        assert result.row not in chunk.rows, f"two results for row {result.row} of {result.chunk_id}"
        common = {"id": result.record_id, "source": chunk.chunk.source, "row": result.row}
        chunk.rows[result.row] = {**common, **result_row(result)}
        if len(chunk.rows) < chunk.chunk.num_rows:
            return None
        del self._open[result.chunk_id]
        return self._commit(chunk)

    def _commit(self, whole: _OpenChunk) -> Part:
        rows = [whole.rows[row] for row in whole.chunk.rows]
        num_ok = sum(row["status"] == "ok" for row in rows)
        info = PartInfo(
            fingerprint=self._fingerprint,
            settings=self._settings,
            source=whole.source,
            first_row=whole.chunk.first_row,
            num_rows=len(rows),
            num_ok=num_ok,
            num_failed=len(rows) - num_ok,
        )
        self._lock.check()
        part = commit(self._lock.folder, self._table(whole, rows), info)
        with refusing(self._lock.folder):
            self._num_bytes += part.path.stat().st_size
        self._num_rows += info.num_rows
        return part

    def _table(self, whole: _OpenChunk, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        columns = [_column([row.get(field.name) for row in rows], field.type) for field in RESULT_FIELDS]
        table = pa.Table.from_arrays(columns, schema=pa.schema(RESULT_FIELDS))
        if not self._passed.names:
            return table
        passed = pa.concat_tables([whole.passed[row] for row in whole.chunk.rows]).combine_chunks()
        for column in self._passed:
            table = table.append_column(column, readable(passed.column(column.name).cast(column.type)))
        return table


def _column(values: Sequence[str | int | None], kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """*values* as Arrow has them.

    `pa.array` imports pandas, where there is one, to see whether they are a series: that takes half a
    second, in which the first part waits.
    """
    if all(value is None for value in values):
        return pa.nulls(len(values), kind)
    builder = pa.lib.StringBuilder()
    builder.append_values(values if kind == pa.string() else map(_as_text, values))
    column = builder.finish().cast(kind)
    # What it has no room for, beyond 2 GiB, the builder leaves out without a word.
    return column if len(column) == len(values) else pa.array(values, kind)


def _as_text(number: str | int | None) -> str | None:
    return None if number is None else str(number)


def readable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """*column*, with text that is not UTF-8 mended: one such cell would keep readers from the whole part.

    Inside lists and structs a cell with such text becomes null.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return pa.chunked_array([pa.array(map(_mended, column), column.type)])
    return column


def _mended(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except ValueError:
        flat = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
        return flat.as_buffer().to_pybytes().decode(errors="replace") if hasattr(flat, "as_buffer") else None


def result_row(result: Result) -> dict[str, Any]:
    """The columns of a part that *result* fills, by name; the others of a result are null."""
    match result:
        case Completion():
            return {
                "status": "ok",
                "text": result.text,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.prompt_tokens,
                "completion_tokens": result.completion_tokens,
            }
        case Failure():
            return {
                "status": "failed",
                "error_stage": result.stage,
                "error_code": result.code,
                "error_message": result.message,
            }
