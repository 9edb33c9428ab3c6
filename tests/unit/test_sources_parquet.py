"""Records from Parquet files: each row once, whatever the chunks, the row groups and the damage."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import JobError, PlacementError, RecordError, SourceError
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources import RecordColumns, Source, check_columns, cut
from glm4v_batch.sources.parquet import ParquetFiles, ParquetSource
from glm4v_batch.templates import fill, parse_template
from glm4v_batch.types import ENDLESS, Chunk, ImageRef, Record


def write_rows(
    path: Path, num_rows: int, *, rows_per_group: int = 10, first: int = 0, **columns: Sequence[Any]
) -> Path:
    """A file whose images are the text of their row number."""
    rows = range(first, first + num_rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": [f"png {row}".encode() for row in rows],
            "title": [f"title {row}" for row in rows],
            **columns,
        }
    )
    pq.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)
    return path


def opened(path: Path | str, *fields: str, **settings: Any) -> Source:
    """The source, with its files opened in this process."""
    asked = ParquetSettings(kind="parquet", path=str(path), **settings), RecordColumns(fields)
    return ParquetSource(ParquetFiles(*asked), *asked)


def passing(path: Path, *columns: str) -> Source:
    """As `opened`; *columns* pass through."""
    asked = ParquetSettings(kind="parquet", path=str(path)), RecordColumns((), columns)
    return ParquetSource(ParquetFiles(*asked), *asked)


def all_records(source: Source, rows_per_chunk: int = 7) -> list[Record]:
    return [
        record
        for shard in source.shards()
        for chunk in source.chunks(shard, [range(shard.num_rows or 0)], rows_per_chunk)
        for record in source.read(chunk)
    ]


gaps_of_a_shard = st.lists(st.integers(0, 200), unique=True).map(
    lambda bounds: [range(*pair) for pair in zip(sorted(bounds)[::2], sorted(bounds)[1::2], strict=False)]
)


@given(gaps=gaps_of_a_shard, rows_per_chunk=st.integers(1, 50))
def test_cutting_covers_each_gap_row_once_and_crosses_no_grid_line(
    gaps: list[range], rows_per_chunk: int
) -> None:
    pieces = list(cut(gaps, rows_per_chunk))

    assert [row for piece in pieces for row in piece] == [row for gap in gaps for row in gap]
    assert all(piece.start // rows_per_chunk == (piece.stop - 1) // rows_per_chunk for piece in pieces)


@given(rows_per_chunk=st.integers(1, 1000), start=st.integers(0, 10**6))
def test_an_endless_gap_is_cut_as_it_is_asked_for(rows_per_chunk: int, start: int) -> None:
    pieces = cut([range(start, ENDLESS)], rows_per_chunk)

    assert next(pieces).start == start
    assert len(next(pieces)) == rows_per_chunk


@pytest.fixture(scope="module")
def three_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("groups") / "a.parquet", 60, rows_per_group=25)


@given(chunks=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 60)), min_size=1, max_size=6))
def test_any_chunks_in_any_order_hold_their_own_rows(
    three_groups: Path, chunks: list[tuple[int, int]]
) -> None:
    source = opened(three_groups, "title")
    name = source.shards()[0].path

    for first, length in chunks:
        chunk = Chunk(name, first, min(length, 60 - first))
        records = list(source.read(chunk))

        assert [record.row for record in records] == list(chunk.rows)
        assert [record.images[0].data for record in records] == [f"png {row}".encode() for row in chunk.rows]
        assert [record.fields for record in records] == [{"title": f"title {row}"} for row in chunk.rows]


def test_consecutive_chunks_go_on_with_the_open_file(
    three_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glm4v_batch.sources import parquet

    opens: list[str] = []
    open_file = parquet._open

    def counted(fs: Any, path: str) -> Any:
        opens.append(path)
        return open_file(fs, path)

    monkeypatch.setattr(parquet, "_open", counted)

    assert len(all_records(opened(three_groups), rows_per_chunk=7)) == 60

    assert len(opens) == 1


def test_two_readers_at_once_do_not_disturb_each_other(three_groups: Path) -> None:
    source = opened(three_groups)
    name = source.shards()[0].path

    pairs = list(zip(source.read(Chunk(name, 0, 30)), source.read(Chunk(name, 30, 30)), strict=True))

    assert [(a.row, b.row) for a, b in pairs] == [(row, row + 30) for row in range(30)]


def test_a_chunk_that_was_given_up_is_read_again_from_its_start(three_groups: Path) -> None:
    source = opened(three_groups)
    chunk = Chunk(source.shards()[0].path, 5, 10)
    given_up = source.read(chunk)
    next(given_up)

    assert [record.row for record in source.read(chunk)] == list(chunk.rows)


def test_files_of_finished_shards_are_closed(tmp_path: Path) -> None:
    for index in range(5):
        write_rows(tmp_path / f"{index}.parquet", 10)
    source = opened(tmp_path)

    all_records(source)

    links = list(Path("/proc/self/fd").iterdir())
    assert not [link for link in links if link.exists() and str(tmp_path) in str(link.resolve())]


def test_only_the_asked_columns_are_carried_along(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", 3, key=[1, 2, 3], other=["x", "y", "z"])

    (record, *_) = all_records(opened(path, "other", id="key"))

    assert (record.record_id, record.fields) == ("1", {"other": "x"})


def test_records_without_an_id_are_named_by_shard_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "a.parquet", 3, key=["k", None, "m"])
    monkeypatch.chdir(tmp_path)

    assert [r.record_id for r in all_records(opened("data/*.parquet"))] == [
        "data/a.parquet#0",
        "data/a.parquet#1",
        "data/a.parquet#2",
    ]
    assert [r.record_id for r in all_records(opened("data/*.parquet", id="key"))] == [
        "k",
        "data/a.parquet#1",
        "m",
    ]


struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("column", "images"),
    [
        (pa.array([b"x"]), (ImageRef(data=b"x"),)),
        (pa.array([b"x"], pa.large_binary()), (ImageRef(data=b"x"),)),
        (pa.array([None], pa.binary()), (ImageRef(),)),
        (pa.array(["a/b.png"]), (ImageRef(path="a/b.png"),)),
        (pa.array([{"bytes": b"x", "path": "p"}], struct), (ImageRef(data=b"x"),)),
        (pa.array([{"bytes": None, "path": "p"}], struct), (ImageRef(path="p"),)),
        (pa.array([{"bytes": None, "path": None}], struct), (ImageRef(),)),
        (pa.array([None], struct), (ImageRef(),)),
        (pa.array([[b"x", None, b"y"]]), (ImageRef(data=b"x"), ImageRef(), ImageRef(data=b"y"))),
        (pa.array([[{"bytes": b"x", "path": None}]], pa.list_(struct)), (ImageRef(data=b"x"),)),
        (pa.array([["p", "q"]]), (ImageRef(path="p"), ImageRef(path="q"))),
        (pa.array([[]], pa.list_(pa.binary())), ()),
    ],
)
def test_images_are_bytes_structs_paths_or_lists_of_these(
    tmp_path: Path, column: pa.Array, images: tuple[ImageRef, ...]
) -> None:
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")

    (record,) = all_records(opened(tmp_path / "a.parquet"))

    assert record.images == images


def test_a_column_that_holds_no_images_is_a_mistake_of_the_job(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", 2, score=[1, 2])

    with pytest.raises(JobError, match=r"source.image names score, which holds int64, not images"):
        opened(path, image="score")


def test_text_that_is_not_utf8_fails_the_prompt_and_no_neighbour(tmp_path: Path) -> None:
    binary = pa.array([b"good", b"caf\xe9", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"image": [b"x"] * 3, "title": text}), tmp_path / "a.parquet")

    good, broken, fine = (record.fields for record in all_records(opened(tmp_path, "title")))

    assert (good["title"], fine["title"]) == ("good", "fine")
    assert pa.array([broken["title"]]).to_pylist() == ["caf\ufffd"]
    with pytest.raises(RecordError) as raised:
        fill(parse_template("{title}"), broken)
    assert (raised.value.stage, raised.value.code) == ("read", "text_not_utf8")


def test_a_file_a_folder_and_a_glob_find_files_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b.parquet", "sub/a.parquet", "a.parquet", ".hidden/x.parquet", "_tmp/x.parquet"):
        write_rows(tmp_path / name, 1)
    (tmp_path / "notes.txt").write_text("x")

    def names(path: Path) -> list[str]:
        return [os.path.relpath(shard.path, tmp_path) for shard in opened(path).shards()]

    assert names(tmp_path) == ["a.parquet", "b.parquet", "sub/a.parquet"]
    assert names(tmp_path / "*.parquet") == ["a.parquet", "b.parquet"]
    assert names(tmp_path / "b.parquet") == ["b.parquet"]


def test_an_existing_name_is_no_glob(tmp_path: Path) -> None:
    write_rows(tmp_path / "part[1].parquet", 4)

    assert len(all_records(opened(tmp_path / "part[1].parquet"))) == 4


def test_shards_of_a_relative_path_are_named_relatively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "a.parquet", 1)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    assert [shard.path for shard in opened("../data/*.parquet").shards()] == ["../data/a.parquet"]


def test_remote_files_are_read_through_fsspec(tmp_path: Path) -> None:
    local = write_rows(tmp_path / "a.parquet", 30)
    fsspec.filesystem("memory").pipe("/bucket/a.parquet", local.read_bytes())

    source = opened("memory://bucket/*.parquet", "title")

    assert [shard.path for shard in source.shards()] == ["memory:///bucket/a.parquet"]
    assert [record.row for record in all_records(source)] == list(range(30))


def test_the_identity_is_path_size_footer_and_a_sample_of_the_data(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", 30)

    (shard,) = opened(path).shards()

    data = path.read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert shard.num_rows == 30
    assert shard.identity == {
        "path": str(path),
        "size": len(data),
        "footer_sha256": hashlib.sha256(footer).hexdigest(),
        # Small files count whole.
        "sample_sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_footer_longer_than_the_first_read_is_whole(tmp_path: Path) -> None:
    columns: dict[str, Any] = {f"column_{index}_{'x' * 200}": [index] for index in range(400)}
    path = write_rows(tmp_path / "a.parquet", 1, **columns)

    source = opened(path)

    assert len(source.schema.names) == 402
    assert len(all_records(source)) == 1


def test_a_file_that_changes_during_the_run_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", 30)
    source = opened(path)
    write_rows(path, 30, first=100)

    with pytest.raises(SourceError, match="has changed"):
        all_records(source)


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none/\*.parquet finds no Parquet files"):
        opened(tmp_path / "none" / "*.parquet")


def test_an_unknown_protocol_is_a_mistake_of_the_job() -> None:
    with pytest.raises(JobError, match=r"source.path nosuch://x"):
        opened("nosuch://x")


@pytest.mark.parametrize(
    ("said", "error"), [("can't start new thread", PlacementError), ("a fault of ours", RuntimeError)]
)
def test_a_system_that_starts_no_more_threads_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(said)

    path = write_rows(tmp_path / "a.parquet", 1)
    monkeypatch.setattr("glm4v_batch.sources.parquet.ThreadPoolExecutor.map", refuse)

    with pytest.raises(error):
        opened(path)


def test_all_unreadable_files_are_named_at_once(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.parquet", 10).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(good[:-20])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "text.parquet").write_bytes(b"hello " * 100)
    (tmp_path / "long.parquet").write_bytes(good[:-8] + b"\xff\xff\xff\x7fPAR1")
    (tmp_path / "noise.parquet").write_bytes(good[:-100] + b"\xff" * 92 + good[-8:])

    with pytest.raises(SourceError) as raised:
        opened(tmp_path)

    message = str(raised.value)
    assert [name for name in ("cut", "empty", "text", "long", "noise") if f"{name}.parquet" in message] == [
        "cut",
        "empty",
        "text",
        "long",
        "noise",
    ]
    assert "good.parquet" not in message


def test_damage_inside_a_page_names_file_and_row_group(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", 30, rows_per_group=10)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(0)
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 3] ^= (
        0xFF
    )
    path.write_bytes(data)
    source = opened(path)
    name = source.shards()[0].path

    assert len(list(source.read(Chunk(name, 0, 10)))) == 10
    with pytest.raises(SourceError, match=r"a.parquet cannot be read in row group 1"):
        list(source.read(Chunk(name, 10, 10)))
    assert len(list(source.read(Chunk(name, 20, 10)))) == 10


def test_a_row_group_that_unpacks_to_far_too_much_is_refused_unread(tmp_path: Path) -> None:
    cell = bytes(30 << 20)
    pq.write_table(
        pa.table({"image": pa.chunked_array([pa.array([cell])] * 12)}),
        tmp_path / "bomb.parquet",
        compression="zstd",
        use_dictionary=False,
    )
    source = opened(tmp_path)

    with pytest.raises(SourceError, match="row group 0: it unpacks from"):
        all_records(source)


def test_files_that_lack_a_needed_column_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", 1, caption=["x"])
    write_rows(tmp_path / "b.parquet", 1)

    assert len(all_records(opened(tmp_path, "title"))) == 2
    with pytest.raises(SourceError, match=r"b.parquet has no column caption"):
        opened(tmp_path, "title", "caption")


def test_types_that_do_not_fit_together_are_named_and_others_are_widened(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", 1, n=pa.array([1], pa.int32()), m=[1], empty=[None])
    write_rows(tmp_path / "b.parquet", 1, n=pa.array([1], pa.int64()), m=["x"], empty=["text"])

    schema = opened(tmp_path, "n", "empty").schema

    assert (schema.field("n").type, schema.field("empty").type) == (pa.int64(), pa.string())
    with pytest.raises(SourceError, match=r"b.parquet: column m holds string, elsewhere int64"):
        opened(tmp_path, "m")


@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.large_list(pa.string()), pa.list_(pa.null())])
def test_a_list_of_a_million_nulls_is_too_large_though_it_takes_nothing(
    tmp_path: Path, kind: pa.DataType
) -> None:
    endless = pa.array([[None] * 1_100_000, [None] * 3, None], kind)
    small = pa.array([b"x"] * 3)
    # What passes through never becomes a Python value.
    pq.write_table(pa.table({"image": endless, "tags": small}), tmp_path / "images.parquet")
    pq.write_table(pa.table({"image": small, "tags": endless}), tmp_path / "passed.parquet")

    images, passed = (all_records(passing(tmp_path / f"{n}.parquet", "tags")) for n in ("images", "passed"))

    assert images[0].oversize_bytes > 128 << 20
    assert [len(record.images) for record in images[1:]] == [3, 1]
    assert [record.oversize_bytes for record in (*images[1:], *passed)] == [0] * 5


def test_images_may_be_stored_differently_from_file_to_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", 1)
    pq.write_table(
        pa.table({"image": pa.array([{"bytes": b"x", "path": None}], struct), "title": ["t"]}),
        tmp_path / "b.parquet",
    )

    assert [r.images[0].data for r in all_records(opened(tmp_path, "title"))] == [b"png 0", b"x"]


def test_every_unknown_column_is_told_with_the_setting_that_asked() -> None:
    asked = {
        "line 4: source.image": ["img"],
        "line 8: prompt.user": ["titel", "id"],
        "output.columns": ["zzz"],
    }

    with pytest.raises(JobError) as raised:
        check_columns(["id", "image", "title"], asked, "data/*.parquet")

    assert str(raised.value).split("\n") == [
        "line 4: source.image asks for img, which is not a column of data/*.parquet. Did you mean image?",
        "line 8: prompt.user asks for titel, which is not a column of data/*.parquet. Did you mean title?",
        "output.columns asks for zzz, which is not a column of data/*.parquet",
    ]
    assert raised.value.hint == "The columns are: id, image, title."


def test_known_columns_pass() -> None:
    check_columns(["id", "image"], {"source.image": ["image"], "prompt.user": []}, "data")


def test_memory_does_not_depend_on_the_size_of_a_row_group(tmp_path: Path) -> None:
    cells = pa.array([os.urandom(200_000) for _ in range(50)])
    table = pa.table({"image": pa.chunked_array([cells] * 30)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=len(table), compression="none")
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    code = (
        "import sys\n"
        "from glm4v_batch.job import ParquetSettings\n"
        "from glm4v_batch.sources import RecordColumns\n"
        "from glm4v_batch.sources.parquet import ParquetFiles, ParquetSource\n"
        "asked = ParquetSettings(kind='parquet', path=sys.argv[1]), RecordColumns()\n"
        "source = ParquetSource(ParquetFiles(*asked), *asked)\n"
        "(shard,) = source.shards()\n"
        "for chunk in source.chunks(shard, [range(shard.num_rows)], 128):\n"
        "    for record in source.read(chunk):\n"
        "        assert len(record.images[0].data) == 200_000\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(done.stdout) < 300 << 10, "KiB at the peak, for a row group of 300 MB"
