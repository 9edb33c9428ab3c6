"""The proof that a folder is whole: nothing that is wrong passes, and nothing that is read does harm."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm4v_batch.errors import OutputError
from glm4v_batch.output import fingerprint, locked
from glm4v_batch.part_check import Fault, check_part
from glm4v_batch.parts import FOOTER_KEY, RESULT_FIELDS, STATE_FOLDER, PartInfo, _footer, part_name
from glm4v_batch.sources import Shard
from glm4v_batch.types import Chunk, Record
from glm4v_batch.verdict_text import verdict_as_json, verdict_as_text
from glm4v_batch.verify import Verdict, verify, verify_against

SETTINGS = {"prompt.user": "Describe.", "output.columns": ["title"]}
SCHEMA = pa.schema([*RESULT_FIELDS, pa.field("title", pa.string())])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out" / STATE_FOLDER / "tmp").mkdir(parents=True)
    return tmp_path / "out"


def row(number: int, source: str = "a.parquet", *, failed: bool = False) -> dict[str, Any]:
    answer = {"text": f"text {number}", "finish_reason": "stop", "prompt_tokens": 12, "completion_tokens": 3}
    error = {"error_stage": "decode", "error_code": "image_truncated", "error_message": "it ends early"}
    outcome = {"status": "failed", **error} if failed else {"status": "ok", **answer}
    return {
        "id": f"{source}#{number}",
        "source": source,
        "row": number,
        "title": f"title {number}",
        **outcome,
    }


def info_of(rows: Sequence[dict[str, Any]], **changes: Any) -> PartInfo:
    num_ok = sum(each["status"] == "ok" for each in rows)
    described: dict[str, Any] = {
        "settings": SETTINGS,
        "fingerprint": fingerprint(changes.get("settings", SETTINGS)),
        "source": {"path": rows[0]["source"], "size": 9},
        "first_row": rows[0]["row"],
        "num_rows": len(rows),
        "num_ok": num_ok,
        "num_failed": len(rows) - num_ok,
    }
    return PartInfo(**{**described, **changes})


def write(folder: Path, rows: Sequence[dict[str, Any]], info: PartInfo | None = None, **options: Any) -> Path:
    """A part of *rows* as a run writes it, or with another footer."""
    info = info or info_of(rows)
    path = folder / part_name(str(info.source["path"]), info.first_row, info.num_rows, info.fingerprint)
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA).replace_schema_metadata(
        {FOOTER_KEY: _footer(info)}
    )
    pq.write_table(table, path, **{"compression": "zstd", "write_page_checksum": True, **options})
    return path


def rows_of(first: int, stop: int, source: str = "a.parquet") -> list[dict[str, Any]]:
    return [row(number, source) for number in range(first, stop)]


def kinds(verdict: Verdict) -> list[str]:
    return [fault.kind for fault in verdict.faults]


def test_a_sound_folder_is_proven_with_its_counts_by_source_and_code(folder: Path) -> None:
    write(folder, [row(0), row(1, failed=True), row(2)])
    write(folder, rows_of(3, 6))
    write(folder, [row(0, "b.parquet", failed=True)])

    verdict = verify(folder)

    assert (verdict.exit_code, verdict.faults, verdict.notices) == (0, (), ())
    assert verdict.fingerprint == fingerprint(SETTINGS)
    assert [(s.path, s.num_parts, s.num_ok, s.num_failed, s.failures) for s in verdict.sources] == [
        ("a.parquet", 2, 5, 1, {"image_truncated": 1}),
        ("b.parquet", 1, 0, 1, {"image_truncated": 1}),
    ]
    assert (
        verdict_as_text(verdict).splitlines()[-1].startswith("Sound: 7 rows, 5 ok and 2 failed, each once.")
    )


OK, FAILED = row(1), row(1, failed=True)
WRONG_ROWS = {
    "out of order": {**OK, "row": 7},
    "of another source": {**OK, "source": "b.parquet"},
    "without an id": {**OK, "id": None},
    "with a status other than ok and failed": {**OK, "status": "done"},
    "that count as ok without an answer": {**OK, "text": None},
    "that count as ok with an error": {**OK, "error_code": "image_truncated"},
    "that count as failed without a reason": {**FAILED, "error_code": None},
    "that count as failed with an answer": {**FAILED, "text": "a cat"},
    "with an unknown finish_reason": {**OK, "finish_reason": "tired"},
    "with an unknown error_stage": {**FAILED, "error_stage": "dream"},
    "with an unknown error_code": {**FAILED, "error_code": "No idea!"},
}


@pytest.mark.parametrize("what", WRONG_ROWS)
def test_a_row_that_contradicts_itself_or_the_footer_is_a_fault(folder: Path, what: str) -> None:
    write(folder, [row(0), WRONG_ROWS[what], row(2)], info_of([row(0), {**OK, **WRONG_ROWS[what]}, row(2)]))

    verdict = verify(folder)

    assert verdict.exit_code == 5
    assert f"holds 1 row {what}, the first is row 1." in verdict.faults[0].what
    assert {fault.kind for fault in verdict.faults} == {"inconsistent"}


def test_a_sound_folder_whose_name_is_not_utf8_is_proven(folder: Path) -> None:
    write(folder, rows_of(0, 3))
    write(folder, rows_of(3, 6))

    verdict = verify(folder.rename(folder.with_name(os.fsdecode(b"o\xfcx"))))

    assert (verdict.exit_code, verdict.faults, verdict.num_parts) == (0, (), 2)


def test_wrong_rows_of_one_kind_are_one_fault_with_their_number(folder: Path) -> None:
    rows = [{**each, "text": None} for each in rows_of(0, 9000)]
    write(folder, rows, row_group_size=5000)

    (fault,) = verify(folder).faults

    assert "holds 9,000 rows that count as ok without an answer, the first is row 0." in fault.what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_ok": 2, "num_failed": 1}, "3 rows, 3 ok and 0 not, its footer says 3, 2 and 1"),
        ({"fingerprint": "f" * 64}, "not that of the settings in its footer"),
        ({"first_row": 4}, "out of order, the first is row 4"),
        ({"source": {"path": "b.parquet"}}, "3 rows of another source"),
        ({"settings": {"output.columns": ["title", "caption"]}}, "other columns than"),
    ],
)
def test_a_footer_that_lies_is_a_fault(folder: Path, changes: dict[str, Any], what: str) -> None:
    rows = rows_of(0, 3)
    write(folder, rows, info_of(rows, **changes))

    verdict = verify(folder)

    assert what in " ".join(fault.what for fault in verdict.faults)
    assert set(kinds(verdict)) == {"inconsistent"}


def test_a_part_under_another_name_is_a_fault(folder: Path) -> None:
    path = write(folder, rows_of(0, 3))
    path.rename(folder / "part-copy.parquet")

    (fault,) = verify(folder).faults

    assert path.name in fault.what


@pytest.mark.parametrize("column", range(len(SCHEMA)))
def test_a_flipped_bit_in_the_page_of_any_column_is_found(folder: Path, column: int) -> None:
    path = write(folder, [row(0), row(1, failed=True)])
    chunk = pq.read_metadata(path).row_group(0).column(column)
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[first + chunk.total_compressed_size - 1] ^= 1

    path.write_bytes(data)

    assert kinds(verify(folder)) == ["unreadable"]


# Pages have checksums, their headers and the file's footer have none.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_changes_nothing_that_is_read(
    folder: Path, place: float, value: int
) -> None:
    write(folder, rows_of(0, 3, "b.parquet"))
    path = write(folder, [row(0), row(1, failed=True), row(2)])
    rows = pq.read_table(path).to_pylist()
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= value

    path.write_bytes(data)
    verdict = verify(folder)

    assert verdict.faults or verdict.notices or pq.read_table(path).to_pylist() == rows


def test_parts_that_pass_columns_through_as_other_types_are_told(folder: Path) -> None:
    path = write(folder, rows_of(0, 3))
    write(folder, rows_of(3, 6))
    write(folder, rows_of(6, 9))
    table = pq.read_table(path)
    title = table.column("title").cast(pa.binary())
    pq.write_table(table.set_column(len(SCHEMA) - 1, "title", title), path, write_page_checksum=True)

    verdict = verify(folder)

    assert verdict.exit_code == 0
    assert verdict.notices == (f"1 part ({path.name}) with other types than the rest: title binary",)


@pytest.mark.parametrize("kept_bytes", [0, 3, 4, 8, 11, 500])
def test_a_part_cut_short_is_a_fault(folder: Path, kept_bytes: int) -> None:
    path = write(folder, rows_of(0, 3))
    write(folder, rows_of(3, 6))
    path.write_bytes(path.read_bytes()[:kept_bytes])

    verdict = verify(folder)

    assert [(fault.kind, fault.where) for fault in verdict.faults] == [("unreadable", path.name)]
    assert sum(source.num_ok for source in verdict.sources) == 3


def test_what_only_looks_like_a_part_is_a_fault_and_does_not_hang(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "part-1-fifo.parquet")
    (folder / "part-2-folder.parquet").mkdir()
    write(tmp_path, rows_of(0, 3)).rename(tmp_path / "elsewhere")
    (folder / "part-3-link.parquet").symlink_to(tmp_path / "elsewhere")
    (folder / "part-4-dangling.parquet").symlink_to(tmp_path / "nowhere")
    pq.write_table(pa.table({"id": ["x"]}), folder / "part-5-foreign.parquet")
    (folder / os.fsdecode(b"part-6-\xff.parquet")).write_bytes(b"PAR1")

    verdict = verify(folder)

    assert kinds(verdict) == ["unreadable"] * 6
    shown = verdict_as_text(verdict)
    assert shown.count("is not a regular file") == 4
    assert "was not written by glm4v-batch" in shown
    assert shown.encode()
    assert json.loads(verdict_as_json(verdict))["exit_code"] == 5


ODD_FOOTERS = {
    "too deep": b"[" * 100_000,
    "no object": b"null",
    "nothing in it": b"{}",
    "no path": _footer(info_of(rows_of(0, 3), source={})),
    "rows before the first": _footer(info_of(rows_of(0, 3), first_row=-5)),
    "counts that are no numbers": _footer(info_of(rows_of(0, 3), num_ok=None, num_failed="x")),
    "settings that are a list": _footer(info_of(rows_of(0, 3), settings=[])),
    "a number without end": _footer(info_of(rows_of(0, 3), first_row=10**400)),
}


@pytest.mark.parametrize("footer", ODD_FOOTERS.values(), ids=ODD_FOOTERS)
def test_a_footer_may_hold_anything(folder: Path, footer: bytes) -> None:
    table = pa.Table.from_pylist(rows_of(0, 3), schema=SCHEMA).replace_schema_metadata({FOOTER_KEY: footer})
    pq.write_table(table, folder / "part-odd.parquet")

    assert kinds(verify(folder)) == ["unreadable"]


def test_a_claimed_footer_larger_than_any_is_not_read(folder: Path) -> None:
    path = folder / "part-large.parquet"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # no disk is used for it
        file.seek((1 << 30) - 8)
        file.write((900 << 20).to_bytes(4, "little") + b"PAR1")

    (fault,) = verify(folder).faults

    assert "claims a footer of 900.00 MiB" in fault.what


def test_rows_that_no_file_of_its_size_holds_are_not_counted_one_by_one(folder: Path) -> None:
    info = info_of(rows_of(0, 3), num_rows=20_000_000, num_ok=20_000_000)
    schema = pa.schema([pa.field("row", pa.int64())]).with_metadata({FOOTER_KEY: _footer(info)})
    with pq.ParquetWriter(folder / "part-nulls.parquet", schema) as writer:
        for _ in range(20):
            writer.write_table(pa.table({"row": pa.nulls(1_000_000, pa.int64())}, schema=schema))

    assert "it claims 20000000 rows" in " ".join(fault.what for fault in verify(folder).faults)


def test_rows_in_two_parts_are_counted_and_named(folder: Path) -> None:
    write(folder, rows_of(0, 10))
    write(folder, rows_of(2, 5))
    write(folder, rows_of(8, 12))

    verdict = verify(folder)

    assert kinds(verdict) == ["doubled", "doubled"]
    assert "both hold rows 2–4 of a.parquet" in verdict.faults[0].what
    assert "both hold rows 8–9 of a.parquet" in verdict.faults[1].what
    assert verdict.sources[0].num_doubled == 5


def test_parts_of_another_job_are_named_with_the_settings_that_differ(folder: Path) -> None:
    other = info_of(rows_of(6, 9), settings={**SETTINGS, "prompt.user": "Count."})
    write(folder, rows_of(0, 3))
    write(folder, rows_of(3, 6))
    write(folder, rows_of(6, 9), other)

    (fault,) = verify(folder).faults

    assert fault.kind == "other_job"
    assert fault.where.startswith("part-a.")
    assert "prompt.user differ" in fault.what


def test_parts_of_two_versions_of_a_source_are_a_fault(folder: Path) -> None:
    write(folder, rows_of(0, 3))
    write(folder, rows_of(3, 6), info_of(rows_of(3, 6), source={"path": "a.parquet", "size": 10}))

    (fault,) = verify(folder).faults

    assert (fault.kind, fault.where) == ("changed", "a.parquet")


def test_holes_are_told_and_are_no_fault_without_the_source(folder: Path) -> None:
    write(folder, rows_of(0, 3))
    write(folder, rows_of(5, 8))

    verdict = verify(folder)

    assert verdict.exit_code == 0
    assert verdict.sources[0].missing == (range(3, 5),)
    (notice,) = verdict.notices
    assert "2 rows between others stand in no part, the first is row 3 of a.parquet" in notice


def test_an_id_that_stands_twice_is_told_and_is_no_fault(folder: Path) -> None:
    write(folder, [{**row(0), "id": "same"}, {**row(1), "id": "same"}, row(2)])

    verdict = verify(folder)

    assert verdict.exit_code == 0
    assert verdict.notices == ("ids that stood before: 1 row; rows are told apart by source and row",)


def test_parts_without_page_checksums_are_told(folder: Path) -> None:
    bare = write(folder, rows_of(0, 3), write_page_checksum=False)
    write(folder, rows_of(3, 6))

    (notice,) = verify(folder).notices

    assert notice.startswith(f"1 part ({bare.name}) without page checksums")


def test_leftovers_and_foreign_files_are_told(folder: Path) -> None:
    write(folder, rows_of(0, 3))
    (folder / "notes.txt").write_text("mine")
    (folder / STATE_FOLDER / "tmp" / "part-x.parquet.77").write_bytes(b"half")

    verdict = verify(folder)

    assert verdict.exit_code == 0
    assert verdict.strays == ("notes.txt", f"{STATE_FOLDER}/tmp/part-x.parquet.77")
    assert len(verdict.notices) == 2


def test_a_run_that_holds_the_folder_is_told_and_keeps_its_lock_and_temporary_files(folder: Path) -> None:
    write(folder, rows_of(0, 3))
    with locked(folder):
        (folder / STATE_FOLDER / "tmp" / "part-x.parquet.77").write_bytes(b"half")

        during = verify(folder)

    after = verify(folder)
    assert during.holder is not None
    assert f"process {os.getpid()}" in during.holder
    assert during.strays == ()
    assert "a run holds this folder" in verdict_as_text(during)
    assert after.holder is None


def test_a_part_that_is_replaced_while_it_is_read_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = write(folder, [row(0), row(1, failed=True)])

    def replace() -> None:
        for number in range(100):
            # Of another length each time: a file system may use an inode again within a tick of its clock.
            answered = {**row(0), "text": "x" * number}
            write(tmp_path, [answered, row(1, failed=number % 2 == 1)]).replace(path)

    replacing = threading.Thread(target=replace)
    replacing.start()
    faults: list[Fault] = []
    while replacing.is_alive():
        faults += check_part(path).faults
    replacing.join()

    assert faults == []


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not an output folder"):
        verify(tmp_path)


def test_the_table_shows_troubled_sources_first_and_sums_up_the_rest(folder: Path) -> None:
    for number in range(30):
        write(folder, rows_of(0, 2, f"{number:02}.parquet"))
    write(folder, rows_of(5, 6, "29.parquet"))

    lines = verdict_as_text(verify(folder)).splitlines()

    assert lines[5].split() == ["29.parquet", "3", "3", "0", "3", "0"]
    assert lines[25].split() == ["and", "10", "more", "20", "20", "0", "0", "0"]
    assert lines[26].split() == ["all", "61", "61", "0", "3", "0"]


def test_no_name_of_a_file_or_source_reaches_a_fault_as_a_terminal_would_obey_it(folder: Path) -> None:
    clear = "\x1b[2J\n\u202e"
    write(folder, rows_of(0, 3)).rename(folder / f"part-a{clear}.parquet")
    other = info_of(rows_of(1, 3), source={"path": f"a.parquet{clear}", "size": 8})
    write(folder, rows_of(1, 3), other).rename(folder / f"part-b{clear}.parquet")
    version = info_of(rows_of(3, 6), source={"path": f"a.parquet{clear}", "size": 9})
    write(folder, rows_of(3, 6), version).rename(folder / f"part-c{clear}.parquet")
    (folder / f"part-d{clear}.parquet").write_bytes(b"PAR1")

    verdict = verify(folder)

    assert {*kinds(verdict)} == {"inconsistent", "changed", "unreadable"}
    assert all(text.isprintable() for fault in verdict.faults for text in (fault.where, fault.what))
    assert {fault.where for fault in verdict.faults if fault.kind == "unreadable"} == {
        r"part-d\x1b[2J\n\u202e.parquet"
    }
    found = json.loads(verdict_as_json(verdict))["faults"]
    assert all(text.isprintable() for fault in found for text in (fault["where"], fault["what"]))


class ChangingSource:
    """Twelve rows of a.parquet; whenever they are counted, something happens in the output folder."""

    schema = SCHEMA
    root = None

    def __init__(self, *happens: Callable[[], object]) -> None:
        self._happens = [*happens]

    def shards(self) -> Sequence[Shard]:
        if self._happens:
            self._happens.pop(0)()
        return [Shard("a.parquet", 12, {"path": "a.parquet", "size": 9})]

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        raise NotImplementedError

    def read(self, chunk: Chunk) -> Iterator[Record]:
        raise NotImplementedError


def test_parts_that_a_run_added_before_it_ended_are_not_missed(folder: Path) -> None:
    write(folder, rows_of(0, 4))
    run = ExitStack()
    run.enter_context(locked(folder))

    def add_a_part_and_end() -> None:
        write(folder, rows_of(4, 12))
        run.close()

    verdict = verify_against(folder, ChangingSource(add_a_part_and_end))

    assert (verdict.faults, verdict.num_parts, verdict.holder) == ((), 2, None)


def test_a_run_that_came_and_went_while_parts_were_read_is_noticed(folder: Path) -> None:
    write(folder, rows_of(0, 4))

    def run() -> None:
        with locked(folder):
            write(folder, rows_of(4, 12))

    verdict = verify_against(folder, ChangingSource(run))

    assert (verdict.faults, verdict.num_parts, verdict.holder) == ((), 2, None)


def test_what_is_missing_while_a_run_has_begun_is_said_to_be_on_its_way(folder: Path) -> None:
    write(folder, rows_of(0, 4))
    with ExitStack() as run:
        verdict = verify_against(folder, ChangingSource(lambda: run.enter_context(locked(folder))))

    assert [(fault.kind, fault.todo) for fault in verdict.faults] == [("missing", "Wait for the run to end.")]
    assert verdict.holder is not None
    assert "a run holds this folder" in verdict_as_text(verdict)


def test_a_folder_that_changes_under_every_look_is_not_looked_at_for_ever(folder: Path) -> None:
    write(folder, rows_of(0, 4))
    numbers = count()

    def change() -> None:
        write(folder, rows_of(4, 8)).replace(folder / f"part-{next(numbers)}.parquet")

    verdict = verify_against(folder, ChangingSource(*[change] * 9))

    assert "missing" in kinds(verdict)
    assert "the parts changed while they were read, 3 times over" in verdict.notices
