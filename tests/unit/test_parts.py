"""Parts: complete or not there, and the only record of what is done."""

import json
import os
import resource
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import OutputError
from glm4v_batch.parts import (
    FOOTER_KEY,
    FORMAT_VERSION,
    STATE_FOLDER,
    Part,
    PartInfo,
    check_room,
    commit,
    failed_rows,
    gaps,
    list_parts,
    part_name,
    read_part,
    read_rows,
    replace,
)


def info(first_row: int = 0, num_rows: int = 3, fingerprint: str = "f" * 64, num_failed: int = 0) -> PartInfo:
    source: dict[str, str | int] = {"path": "a.parquet", "size": 9}
    num_ok = num_rows - num_failed
    return PartInfo(fingerprint, {"prompt.user": "hi"}, source, first_row, num_rows, num_ok, num_failed)


def table(num_rows: int = 3) -> pa.Table:
    return pa.table({"id": [str(n) for n in range(num_rows)]})


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / STATE_FOLDER / "tmp").mkdir(parents=True)
    return tmp_path


def test_a_committed_part_says_in_its_footer_what_it_holds(folder: Path) -> None:
    commit(folder, table(), info())

    (part,) = list_parts(folder)

    assert part.info == info()
    assert part.path.name == part_name("a.parquet", 0, 3, "f" * 64)


def test_a_commit_leaves_no_temporary_file(folder: Path) -> None:
    commit(folder, table(), info())

    assert list((folder / STATE_FOLDER / "tmp").iterdir()) == []


def test_parts_carry_page_checksums(folder: Path) -> None:
    part = commit(folder, table(), info())

    flip(part.path, 30)

    with pytest.raises(OSError, match="CRC"):
        pq.read_table(part.path, page_checksum_verification=True)


def test_committing_the_same_chunk_twice_changes_nothing(folder: Path) -> None:
    first = commit(folder, table(), info())
    before = first.path.stat()

    second = commit(folder, table(), info())

    after = second.path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_foreign_file_under_a_parts_name_is_never_replaced(folder: Path) -> None:
    name = part_name("a.parquet", 0, 3, "f" * 64)
    (folder / name).write_bytes(b"somebody's work")

    with pytest.raises(OutputError, match="damaged"):
        commit(folder, table(), info())

    assert (folder / name).read_bytes() == b"somebody's work"
    assert list((folder / STATE_FOLDER / "tmp").iterdir()) == []


def test_another_settlement_of_the_same_rows_is_refused(folder: Path) -> None:
    commit(folder, table(), info())

    with pytest.raises(OutputError, match="exists already"):
        commit(folder, table(), info(num_failed=1))


def test_all_unusable_parts_are_named_at_once(folder: Path) -> None:
    commit(folder, table(), info())
    (folder / "part-broken.parquet").write_bytes(b"PAR1")
    pq.write_table(table(), folder / "part-foreign.parquet")

    with pytest.raises(OutputError) as caught:
        list_parts(folder)

    assert "part-broken.parquet is damaged" in str(caught.value)
    assert "part-foreign.parquet was not written by glm4v-batch" in str(caught.value)


def test_whatever_is_no_file_under_a_parts_name_is_refused_without_opening_it(folder: Path) -> None:
    part = commit(folder, table(), info())
    os.mkfifo(folder / "part-pipe.parquet")
    (folder / "part-folder.parquet").mkdir()
    (folder / "part-link.parquet").symlink_to(part.path)
    (folder / "part-empty.parquet").touch()

    with pytest.raises(OutputError, match="4 of the parts") as caught:
        list_parts(folder)

    for name in ("pipe", "folder", "link", "empty"):
        assert f"part-{name}.parquet is damaged" in str(caught.value)
    assert "Move them away" in caught.value.hint


def test_a_part_that_cannot_be_read_just_now_is_not_called_damaged(folder: Path) -> None:
    commit(folder, table(), info())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OutputError) as caught:
            read_part(folder / part_name("a.parquet", 0, 3, "f" * 64))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert "Too many open files" in str(caught.value)
    assert "ulimit" in caught.value.hint


def test_a_folder_whose_name_is_not_utf8_takes_parts_and_gives_them_back_whole(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"o\xfcx")
    (odd / STATE_FOLDER / "tmp").mkdir(parents=True)

    part = commit(odd, with_failures(), info(num_failed=2))

    assert list_parts(odd) == [part]
    assert read_rows(part).equals(with_failures())
    assert failed_rows(part) == [(0, "image_missing"), (2, "image_invalid")]


def test_a_folder_whose_name_the_locale_cannot_express_is_refused_for_that(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"the encoding .*, {sys.getfilesystemencoding()}, has no") as e:
        list_parts(tmp_path / "out\ud800")

    assert "LC_ALL=C.UTF-8" in e.value.hint


def test_a_part_that_the_disk_has_no_room_for_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(OutputError, match=r"has .* free, and what is to be written next needs about 1024"):
        check_room(folder, 2**50)

    check_room(folder, 1)


def test_a_folder_that_cannot_be_written_is_refused_with_its_reason(folder: Path) -> None:
    (folder / STATE_FOLDER / "tmp").rmdir()

    with pytest.raises(OutputError, match="No such file or directory"):
        commit(folder, table(), info())


def test_the_data_is_durable_before_the_name_and_the_name_before_commit_returns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def spy_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file")  # noqa: PTH112
        fsync(descriptor)

    def spy_link(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)

    commit(folder, table(), info())

    assert calls == ["fsync file", "link", "fsync folder"]


def test_the_rows_of_a_part_are_read_back_as_they_were_written(folder: Path) -> None:
    part = commit(folder, table(), info())

    assert read_rows(part).equals(table())


READERS = [read_rows, failed_rows]


def with_failures() -> pa.Table:
    codes = ["image_missing", None, "image_invalid"]
    return pa.table({"row": pa.array([0, 1, 2], pa.int64()), "error_code": pa.array(codes, pa.string())})


def test_failed_rows_are_read_with_their_codes(folder: Path) -> None:
    part = commit(folder, with_failures(), info(num_failed=2))

    assert failed_rows(part) == [(0, "image_missing"), (2, "image_invalid")]


@pytest.mark.parametrize("read", READERS)
def test_a_flipped_byte_in_a_page_is_refused_in_one_line_that_names_the_part_and_what_to_do(
    folder: Path, read: Callable[[Part], object]
) -> None:
    part = commit(folder, with_failures(), info(num_failed=2))
    flip(part.path, 30)

    with pytest.raises(
        OutputError, match=rf"^A part in {folder} .*{part.path.name} is damaged: .*CRC.*$"
    ) as e:
        read(part)

    assert "Move it away" in e.value.hint


@pytest.mark.parametrize("read", READERS)
def test_a_part_that_cannot_be_opened_is_not_called_damaged(
    folder: Path, read: Callable[[Part], object]
) -> None:
    part = commit(folder, with_failures(), info(num_failed=2))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot be read: Too many open files") as refusal:
            read(part)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert "The part itself may be whole" in refusal.value.hint


def test_a_part_with_other_columns_has_no_failed_rows_to_tell(folder: Path) -> None:
    part = commit(folder, table(), info(num_failed=2))

    with pytest.raises(OutputError, match="has other columns than a part"):
        failed_rows(part)


def test_a_replaced_part_keeps_its_name_and_nothing_else(folder: Path) -> None:
    old = commit(folder, table(), info(num_failed=1))

    new = replace(folder, pa.table({"id": ["a", "b", "c"]}), info(), old)

    assert list_parts(folder) == [new]
    assert new.path == old.path
    assert new.info.num_failed == 0
    assert read_rows(new).column("id").to_pylist() == ["a", "b", "c"]
    assert list((folder / STATE_FOLDER / "tmp").iterdir()) == []


def test_a_part_that_someone_else_has_changed_is_not_replaced(folder: Path) -> None:
    old = commit(folder, table(), info(num_failed=1))
    theirs = replace(folder, table(), info(num_failed=2), old)

    with pytest.raises(OutputError, match="has changed since"):
        replace(folder, table(), info(), old)

    assert list_parts(folder) == [theirs]
    assert list((folder / STATE_FOLDER / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "source", ["data/my set/ünï 1.parquet", "s3://bucket/a/b.parquet", "x" * 300, "../../etc/passwd"]
)
def test_part_names_are_plain_file_names_whatever_the_source_is_called(source: str) -> None:
    name = part_name(source, 5, 7, "0" * 64)

    assert Path(name).name == name
    assert name.isascii()
    assert len(name) < 128


def footer(**changes: object) -> bytes:
    body = {
        "format": FORMAT_VERSION,
        "fingerprint": "f",
        "settings": {},
        "source": {"path": "a"},
        "rows": [0, 3],
        "counts": {"ok": 3, "failed": 0},
    }
    return json.dumps({**body, **changes}).encode()


@pytest.mark.parametrize(
    "odd",
    [
        footer(source="abc"),
        footer(source={}),
        footer(source={"path": 1}),
        footer(counts={"ok": None, "failed": 3}),
        footer(counts={"ok": 4, "failed": -1}),
        footer(settings=[]),
        footer(fingerprint=None),
        footer(rows=[False, 3]),
        footer(format="1\n" * 1000),
        b"[" * 100_000,
        b"\xff\xfe\xff",
        b"[]",
    ],
)
def test_a_footer_that_no_run_writes_is_refused_by_the_name_of_its_part(folder: Path, odd: bytes) -> None:
    path = folder / "part-odd.parquet"
    pq.write_table(table().replace_schema_metadata({FOOTER_KEY: odd}), path)

    with pytest.raises(OutputError, match=r"^part-odd\.parquet has .*$") as refusal:
        read_part(path)

    assert not refusal.value.hint, "the hint is for obstacles, which are no damage"


def test_overlapping_parts_are_refused() -> None:
    with pytest.raises(OutputError, match="Two parts hold row 3"):
        gaps(10, [range(4), range(3, 5)])


@given(num_rows=st.integers(0, 200), cuts=st.sets(st.integers(0, 200)), keep=st.data())
def test_gaps_and_parts_together_are_all_rows_once(
    num_rows: int, cuts: set[int], keep: st.DataObject
) -> None:
    edges = sorted({0, num_rows, *(cut for cut in cuts if cut < num_rows)})
    pieces = [range(a, b) for a, b in pairwise(edges)]
    done = [piece for piece in pieces if keep.draw(st.booleans())]

    found = gaps(num_rows, done)

    assert sorted(row for rows in [*found, *done] for row in rows) == list(range(num_rows))
