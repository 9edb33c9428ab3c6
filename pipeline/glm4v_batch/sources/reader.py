"""Parquet files in a process of their own: one that crashes, hangs or eats memory costs the file's name.

Each request stands for itself, so that a process that was lost is replaced and asked the same again.
The next one is told what the first one found: a file that another has replaced is noticed by either.
A file over which it dies again and again stops the run: damage must not turn its rows into failed ones.
"""

import os
import pickle
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa

from glm4v_batch.child import Child
from glm4v_batch.confinement import (
    KEPT_VARIABLES,
    be_silent,
    forbid_files,
    forget_environment,
    leave_no_core,
    limit_memory,
)
from glm4v_batch.errors import Glm4vBatchError, SourceError, on_one_line
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources import RecordColumns
from glm4v_batch.sources.listing import find_files, is_local
from glm4v_batch.sources.parquet import REPLACE, Fault, Files, Opened, ParquetFiles, Piece, fault_of, refuse

_MEMORY_BYTES = 2 * 1024**3
_OPEN_SECONDS = 3600.0
_ANSWER_SECONDS = 300.0
_DEATHS = 2
_KILLS = 5  # from outside, which speaks of the machine and not of the file


@dataclass(frozen=True, slots=True)
class _Open:
    """Asks for what opening finds."""


@dataclass(frozen=True, slots=True)
class _List:
    """Asks for the names of the files."""


@dataclass(frozen=True, slots=True)
class _Check:
    """Asks what is wrong with the footer of one file."""

    name: str


@dataclass(frozen=True, slots=True)
class _Rows:
    """Asks for a piece."""

    path: str
    first_row: int
    num_rows: int


_Request = _Open | _List | _Check | _Rows


class _OpenedFiles(Files, Protocol):
    @property
    def opened(self) -> Opened: ...


class OpenFiles(Protocol):
    """Opens files as `ParquetFiles` does."""

    def __call__(
        self,
        settings: ParquetSettings,
        columns: RecordColumns,
        own_output: Path | None,
        opened: Opened | None,
        /,
    ) -> _OpenedFiles:
        """The files, found now or as *opened* says."""


@dataclass(frozen=True, slots=True)
class _Setup:
    """What the process is started with. *folder* is what relative paths are relative to.

    *opened* is what the first process found, None for that one.
    """

    settings: ParquetSettings
    columns: RecordColumns
    own_output: Path | None
    folder: str
    open_files: OpenFiles
    opened: Opened | None = None


@dataclass(frozen=True, slots=True)
class _Bug:
    """The traceback of an error that nobody expected."""

    trace: str


class _LostError(Exception):
    """The process died or hung over a request, every time that it was asked."""


class Reader:
    """The files of *settings*, opened in another process; see `parquet.Files`.

    *open_files* must be importable there. Raises what it raises, and SourceError for files that kill
    their reader.
    """

    def __init__(
        self,
        settings: ParquetSettings,
        columns: RecordColumns,
        own_output: Path | None = None,
        open_files: OpenFiles = ParquetFiles,
    ) -> None:
        self._setup = _Setup(settings, columns, own_output, str(Path.cwd()), open_files)
        self._child: Child | None = None
        opened = self._open()
        self.schema, self.shards = opened.schema, opened.shards
        self._setup = replace(self._setup, opened=opened)

    def piece(self, path: str, first_row: int, num_rows: int) -> Piece:
        """See `parquet.Files.piece`."""
        try:
            stream, oversize_bytes = self._ask(_Rows(path, first_row, num_rows), _ANSWER_SECONDS)
        except _LostError as lost:
            raise SourceError(
                f"{on_one_line(path)} cannot be read at row {first_row}: {lost}.",
                hint=REPLACE,
            ) from None
        return Piece(pa.ipc.open_stream(stream).read_next_batch(), oversize_bytes)

    def _open(self) -> Opened:
        try:
            return cast(Opened, self._ask(_Open(), _OPEN_SECONDS))
        except _LostError as lost:
            refuse(self._faults())
            raise SourceError(f"{self._setup.settings.path} cannot be read: {lost}.") from None

    def _faults(self) -> list[Fault]:
        """What is wrong with each file by itself, where they can be listed at all."""
        try:
            names: Sequence[str] = self._ask(_List(), _OPEN_SECONDS)
        except _LostError:
            return []
        return [fault for name in names if (fault := self._fault(name))]

    def _fault(self, name: str) -> Fault | None:
        try:
            return cast(Fault | None, self._ask(_Check(name), _ANSWER_SECONDS))
        except _LostError as lost:
            return Fault(f"{name} cannot be read in its footer: {lost}.", REPLACE)

    def _ask(self, request: _Request, patience_seconds: float) -> Any:
        """The process's answer. Raises _LostError where it dies or hangs over *request* again and again."""
        num_deaths = num_kills = 0
        while True:
            child = self._child = self._child or Child(_serve, self._setup, name="glm4v-reader")
            try:
                return _unpacked(_answer(child, request, patience_seconds))
            except TimeoutError:
                how, was_killed = f"it did not answer within {patience_seconds:g} s", False
                child.end(grace_seconds=0)
            except (EOFError, OSError):
                end = child.end(grace_seconds=1)
                end.refuse_unguarded()
                how, was_killed = f"it died by {end}", end.was_killed
            self._child = None
            num_kills += was_killed
            num_deaths += not was_killed
            if num_deaths == _DEATHS or num_kills == _KILLS:
                raise _LostError(f"its reader was lost {num_deaths + num_kills} times, at last {how}")


def _answer(child: Child, request: _Request, patience_seconds: float) -> bytes:
    """What *child* sends back. Raises EOFError or OSError where it has died, TimeoutError where it hangs."""
    child.pipe.send(request)
    if not child.pipe.poll(patience_seconds):
        raise TimeoutError
    return child.pipe.recv_bytes()


def _unpacked(answer: bytes) -> Any:
    content = pickle.loads(answer)  # noqa: S301  from our own process
    if isinstance(content, Glm4vBatchError):
        raise content
    if isinstance(content, _Bug):
        raise RuntimeError(f"reading the source failed:\n{content.trace}")
    return content


def _serve(pipe: Connection, setup: _Setup) -> None:
    """The process: answer requests until the driver closes the pipe."""
    os.chdir(setup.folder)
    if is_local(setup.settings):
        # Remote ones may need credentials from the environment, and a cache.
        forget_environment(KEPT_VARIABLES | {"HOME"})  # which a path may begin with, as ~
        forbid_files()
    be_silent()
    leave_no_core()
    limit_memory(_MEMORY_BYTES)
    service = _Service(setup)
    with suppress(EOFError, OSError):  # the driver is gone, or has closed the pipe
        while True:
            pipe.send_bytes(pickle.dumps(service.answer(pipe.recv()), protocol=5))


class _Service:
    """Answers requests; it owns the opened files."""

    def __init__(self, setup: _Setup) -> None:
        self._setup = setup
        self._files: _OpenedFiles | None = None

    def answer(self, request: _Request) -> Any:
        """The answer to *request*, or the error that it met."""
        try:
            return self._answer(request)
        except Glm4vBatchError as error:  # the driver raises it
            return error
        except Exception:  # the border of the process: the driver shows it
            return _Bug(traceback.format_exc())

    def _answer(self, request: _Request) -> Any:
        match request:
            case _Open():
                return self._opened().opened
            case _List():
                return list(self._found()[1])
            case _Check(name):
                fs, found = self._found()
                return fault_of(fs, found[name], name)
            case _Rows(path, first_row, num_rows):
                piece = self._opened().piece(path, first_row, num_rows)
                return _as_stream(piece.rows), piece.oversize_bytes

    def _found(self) -> tuple[Any, dict[str, str]]:
        return find_files(self._setup.settings, self._setup.own_output)

    def _opened(self) -> _OpenedFiles:
        if self._files is None:
            setup = self._setup
            self._files = setup.open_files(setup.settings, setup.columns, setup.own_output, setup.opened)
        return self._files


def _as_stream(rows: pa.RecordBatch) -> bytes:
    # Unlike a pickled slice this holds no more than its own rows.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    return cast(bytes, sink.getvalue().to_pybytes())
