"""Parts: immutable Parquet files, one per chunk, whose footers are the only record of what is done.

A part becomes visible under its final name by `link()`, complete and synced, or not at all.
`rename()` would do that too, but it silently replaces what is there; `link()` refuses.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glm4v_batch.errors import OutputError

FORMAT_VERSION = 1
FOOTER_KEY = b"glm4v_batch"
STATE_FOLDER = ".glm4v-batch"
_ENDLESS = 2**62

RESULT_FIELDS = (
    pa.field("id", pa.string()),
    pa.field("text", pa.string()),
    pa.field("status", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("error_stage", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("source", pa.string()),
    pa.field("row", pa.int64()),
)
"""The columns of every part, before those passed through from the source."""


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What a part's footer says: whose rows it holds, by which settings, and how they ended.

    *source* is the shard's identity, with at least its path; *settings* are the keys and values
    that the fingerprint was made of.
    """

    fingerprint: str
    settings: Mapping[str, Any]
    source: Mapping[str, str | int]
    first_row: int
    num_rows: int
    num_ok: int
    num_failed: int

    @property
    def rows(self) -> range:
        """The row numbers of the source that the part holds."""
        return range(self.first_row, self.first_row + self.num_rows)


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part."""

    path: Path
    info: PartInfo


def part_name(source: str, first_row: int, num_rows: int, fingerprint: str) -> str:
    """The one name that a chunk's part can have.

    >>> part_name("data/scenes/scenes-00000.parquet", 128, 16, "0123456789abcdef")
    'part-scenes-00000.002e94eb-000000128-16-0123456789ab.parquet'
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).name.split(".")[0])[:40]
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"part-{stem}.{digest}-{first_row:09d}-{num_rows}-{fingerprint[:12]}.parquet"


def commit(folder: Path, table: pa.Table, info: PartInfo) -> Part:
    """Make *table* visible in *folder* as the part that *info* describes, durably, or raise OutputError.

    Committing a chunk twice is harmless: a part of the same chunk and fingerprint that is
    already there stays as it is.
    """
    source = str(info.source["path"])
    final = folder / part_name(source, info.first_row, info.num_rows, info.fingerprint)
    temporary = folder / STATE_FOLDER / "tmp" / f"{final.name}.{os.getpid()}"
    with refusing(folder):
        try:
            _write_synced(temporary, table.replace_schema_metadata({FOOTER_KEY: _footer(info)}))
            _check_rows(temporary, info)
            return _publish(temporary, final, info)
        finally:
            temporary.unlink(missing_ok=True)


def _write_synced(path: Path, table: pa.Table) -> None:
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())


def _check_rows(path: Path, info: PartInfo) -> None:
    written = pq.read_metadata(path).num_rows
    assert written == info.num_rows, f"{path} holds {written} rows instead of {info.num_rows}"


def _publish(temporary: Path, final: Path, info: PartInfo) -> Part:
    try:
        os.link(temporary, final)
    except FileExistsError:
        present = read_part(final)
        if present.info != info:
            raise OutputError(
                f"{final} exists already and is not the part that this run would write.",
                hint="Move it away, or choose another output.path.",
            ) from None
        return present
    sync_folder(final.parent)
    return Part(final, info)


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn what the file system says against writing to *folder* into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}.",
            hint="What is committed is safe. Mend this, then run the same command again.",
        ) from error


def _footer(info: PartInfo) -> bytes:
    body = {
        "format": FORMAT_VERSION,
        "fingerprint": info.fingerprint,
        "settings": info.settings,
        "source": info.source,
        "rows": [info.first_row, info.num_rows],
        "counts": {"ok": info.num_ok, "failed": info.num_failed},
    }
    return json.dumps(body, sort_keys=True, ensure_ascii=False).encode()


def list_parts(folder: Path) -> list[Part]:
    """The parts of *folder*, sorted by name, from their footers alone.

    Raises OutputError, naming all of them, where a file called `part-*.parquet` is not a whole
    part of ours.
    """
    parts, damaged = [], []
    for path in _part_paths(folder):
        try:
            parts.append(read_part(path))
        except OutputError as error:
            if error.hint:  # an obstacle, not damage
                raise
            damaged.append(f"  {error}")
    if damaged:
        raise OutputError(
            "\n".join([f"{len(damaged)} of the parts in {folder} cannot be used:", *damaged]),
            hint="Move them away: the rows of a damaged part are then done again. If none of them is of this "
            "job, choose another output.path.",
        )
    _refuse_overlaps(parts)
    return parts


def _part_paths(folder: Path) -> list[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir())  # glob takes an unreadable folder for empty
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read: {error.strerror}.",
            hint="An output is a folder that this user can read and write.",
        ) from None
    return [folder / name for name in names if name.startswith("part-") and name.endswith(".parquet")]


def _refuse_overlaps(parts: Sequence[Part]) -> None:
    def place(part: Part) -> tuple[str, int]:
        return str(part.info.source["path"]), part.info.first_row

    for one, other in pairwise(sorted(parts, key=place)):
        if place(one)[0] == place(other)[0] and other.info.first_row < one.info.rows.stop:
            raise OutputError(
                f"{one.path.name} and {other.path.name} in {one.path.parent} hold the same rows of "
                f"{place(one)[0]}.",
                hint="Move one of them away: each row may stand in one part only.",
            )


def read_part(path: Path) -> Part:
    """What the footer of *path* says. Raises OutputError where it is damaged or not ours."""
    try:
        metadata = pq.read_metadata(path)
    except PermissionError:
        raise OutputError(
            f"{path} may not be read by this user.",
            hint="Mend its permissions; the part itself may be whole.",
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{path.name} is damaged: {error}") from None
    footer = (metadata.metadata or {}).get(FOOTER_KEY)
    if footer is None:
        raise OutputError(f"{path.name} was not written by glm4v-batch")
    return Part(path, _info(path, footer, metadata.num_rows))


def _info(path: Path, footer: bytes, num_rows: int) -> PartInfo:
    try:
        body = json.loads(footer)
        if body["format"] != FORMAT_VERSION:
            raise OutputError(f"{path.name} has format {body['format']}, this version reads {FORMAT_VERSION}")
        first_row, rows = body["rows"]
        counts = body["counts"]
        info = PartInfo(
            body["fingerprint"],
            body["settings"],
            body["source"],
            first_row,
            rows,
            counts["ok"],
            counts["failed"],
        )
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{path.name} has a footer that cannot be read") from None
    if num_rows != rows or info.num_ok + info.num_failed != rows:
        raise OutputError(f"{path.name} holds {num_rows} rows, its footer says {rows}")
    return info


def gaps(num_rows: int | None, done: Sequence[range]) -> list[range]:
    """The rows of a shard that no part holds yet, as ascending ranges.

    *num_rows* is None where it is unknown; the last gap is then endless. Raises OutputError
    where two parts hold the same row.

    >>> gaps(10, [range(6, 8), range(0, 4)])
    [range(4, 6), range(8, 10)]
    """
    end = _ENDLESS if num_rows is None else num_rows
    found, next_row = [], 0
    for rows in sorted(done, key=lambda r: r.start):
        if rows.start < next_row:
            raise OutputError(f"Two parts hold row {rows.start} of the same source.")
        if rows.start > next_row:
            found.append(range(next_row, rows.start))
        next_row = rows.stop
    if next_row < end:
        found.append(range(next_row, end))
    return found
