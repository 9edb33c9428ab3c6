"""Records from data sets of the `datasets` library: addressed, saved and streamed, never decoded."""

import errno
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from glm4v_batch.errors import JobError, SourceError
from glm4v_batch.job import DatasetSettings, ParquetSettings
from glm4v_batch.sources import RecordColumns, Source, open_source
from glm4v_batch.types import ENDLESS, Chunk, Record

datasets = pytest.importorskip("datasets")

NUM_ROWS = 20


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def make(num_rows: int = NUM_ROWS, shade: int = 0) -> Any:
    features = datasets.Features(
        {"key": datasets.Value("string"), "image": datasets.Image(), "views": datasets.List(datasets.Image())}
    )
    images = [{"bytes": png(shade + row), "path": None} for row in range(num_rows)]
    columns = {
        "key": [f"k{row}" for row in range(num_rows)],
        "image": images,
        "views": [[image, image] for image in images],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    make().to_parquet(folder / "train.parquet")
    return folder


def opened(path: Path | str, *fields: str, **settings: Any) -> Source:
    return open_source(DatasetSettings(kind="dataset", path=str(path), **settings), RecordColumns(fields))


def all_records(source: Source, rows_per_chunk: int = 7) -> list[Record]:
    (shard,) = source.shards()
    gap = range(ENDLESS if shard.num_rows is None else shard.num_rows)
    chunks = source.chunks(shard, [gap], rows_per_chunk)
    return [record for chunk in chunks for record in source.read(chunk)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder_gives_the_rows_that_parquet_gives(parquet_folder: Path, streaming: bool) -> None:
    settings = ParquetSettings(kind="parquet", path=str(parquet_folder), id="key")
    plain = open_source(settings, RecordColumns(("key",)))

    records = all_records(opened(parquet_folder, "key", id="key", streaming=streaming))

    assert [(r.record_id, r.row, r.images, r.fields) for r in records] == [
        (r.record_id, r.row, r.images, r.fields) for r in all_records(plain)
    ]
    assert records[3].images[0].data == png(3)


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_images_stay_encoded(parquet_folder: Path, streaming: bool) -> None:
    record = all_records(opened(parquet_folder, image="views", streaming=streaming))[5]

    assert [image.data for image in record.images] == [png(5), png(5)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_or_url_in_a_record_is_handed_on_unopened(tmp_path: Path, streaming: bool) -> None:
    features = datasets.Features({"image": datasets.Image()})
    images = [{"bytes": None, "path": path} for path in ("/etc/passwd", "http://127.0.0.1:9/x.png")]
    (tmp_path / "evil").mkdir()
    # Written by pyarrow: the library itself would open what the paths name, to embed it.
    table = pa.table({"image": images}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "evil" / "a.parquet")

    records = all_records(opened(tmp_path / "evil", streaming=streaming))

    assert [r.images[0].path for r in records] == ["/etc/passwd", "http://127.0.0.1:9/x.png"]
    assert [r.images[0].data for r in records] == [None, None]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_gives_paths_below_its_root(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(3):
        (folder / f"{row}.png").write_bytes(png(row))

    source = opened(folder, streaming=streaming)

    assert source.root == str(folder)
    paths = [record.images[0].path for record in all_records(source)]
    assert [Path(folder, str(path)).read_bytes() for path in paths] == [png(0), png(1), png(2)]
    assert opened(folder, streaming=streaming, root="/elsewhere").root == "/elsewhere"


def test_saved_data_sets_are_read_with_their_splits(tmp_path: Path) -> None:
    make().save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make(), "test": make(3)}).save_to_disk(tmp_path / "many")

    assert len(all_records(opened(tmp_path / "one"))) == NUM_ROWS
    assert len(all_records(opened(tmp_path / "many"))) == NUM_ROWS
    assert len(all_records(opened(tmp_path / "many", split="test"))) == 3


def test_a_setting_that_a_saved_data_set_cannot_honour_is_refused(tmp_path: Path) -> None:
    make(2).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make(2)}).save_to_disk(tmp_path / "many")

    with pytest.raises(JobError, match=r"source.name, source.streaming has no effect"):
        opened(tmp_path / "one", name="x", streaming=True)
    with pytest.raises(JobError, match="holds the split train"):
        opened(tmp_path / "one", split="test")
    with pytest.raises(JobError, match=r"source.split is test") as raised:
        opened(tmp_path / "many", split="test")
    assert "train" in raised.value.hint


def test_a_revision_of_a_local_folder_is_refused(parquet_folder: Path) -> None:
    with pytest.raises(JobError, match=r"source.revision has no effect"):
        opened(parquet_folder, revision="abc")


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_splits_and_configurations_are_mistakes_of_the_job(
    parquet_folder: Path, streaming: bool
) -> None:
    with pytest.raises(JobError, match="train"):
        opened(parquet_folder, split="nope", streaming=streaming)
    with pytest.raises(JobError, match="nope"):
        opened(parquet_folder, name="nope", streaming=streaming)


def test_a_data_set_that_cannot_be_reached_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(SourceError, match="cannot be loaded") as not_here:
        opened("nobody/nothing")
    with pytest.raises(SourceError, match="cannot be loaded") as empty:
        opened(tmp_path / "empty")

    assert "no such folder here" in not_here.value.hint
    assert not empty.value.hint


def test_trouble_of_the_disk_says_where(parquet_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied", "/cache/it's here/lock")

    monkeypatch.setattr("datasets.load_dataset", refuse)

    with pytest.raises(SourceError, match="cannot be loaded: Permission denied: /cache/it's here/lock"):
        opened(parquet_folder)


def test_damaged_files_are_a_source_error(parquet_folder: Path) -> None:
    path = parquet_folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:-30])

    with pytest.raises(SourceError, match="cannot be loaded"):
        opened(parquet_folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_gaps_are_read_and_nothing_else(parquet_folder: Path, streaming: bool) -> None:
    source = opened(parquet_folder, streaming=streaming)
    (shard,) = source.shards()
    last = ENDLESS if streaming else NUM_ROWS

    chunks = []
    for chunk in source.chunks(shard, [range(2, 5), range(8, 9), range(11, last)], 4):
        records = list(source.read(chunk))
        assert [(r.row, r.images[0].data) for r in records] == [(row, png(row)) for row in chunk.rows]
        chunks.append((chunk.first_row, chunk.num_rows))

    assert chunks == [(2, 2), (4, 1), (8, 1), (11, 1), (12, 4), (16, 4)]


def test_a_stream_ends_with_a_shorter_chunk_and_then_has_no_more(parquet_folder: Path) -> None:
    source = opened(parquet_folder, streaming=True)
    (shard,) = source.shards()

    sizes = [chunk.num_rows for chunk in source.chunks(shard, [range(ENDLESS)], 8)]

    assert shard.num_rows is None
    assert sizes == [8, 8, 4]
    assert list(source.chunks(shard, [range(NUM_ROWS, ENDLESS)], 8)) == []


def test_a_chunk_of_a_stream_is_read_twice_alike_even_when_it_is_held_no_longer(parquet_folder: Path) -> None:
    source = opened(parquet_folder, streaming=True)
    (shard,) = source.shards()

    chunks = list(source.chunks(shard, [range(ENDLESS)], 3))
    records = [record for chunk in chunks for record in source.read(chunk)]

    assert len(chunks) == 7
    assert [r.row for r in records] == list(range(NUM_ROWS))
    assert list(source.read(Chunk(shard.path, 3, 3))) == records[3:6]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_identity_stays_between_runs_and_changes_with_the_data(
    parquet_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    def identity() -> object:
        return opened(parquet_folder, "key", streaming=streaming).shards()[0].identity

    first = identity()
    again = identity()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    elsewhere = identity()
    make(shade=100).to_parquet(parquet_folder / "train.parquet")
    changed = identity()

    assert first == again == elsewhere
    assert changed != first


def test_the_identity_of_a_saved_data_set_changes_when_it_is_saved_anew(tmp_path: Path) -> None:
    make().save_to_disk(tmp_path / "saved")
    first, again = (opened(tmp_path / "saved").shards()[0].identity for _ in range(2))
    make(shade=100).save_to_disk(tmp_path / "saved")

    assert first == again
    assert opened(tmp_path / "saved").shards()[0].identity != first


def test_the_identity_does_not_depend_on_the_columns_asked(parquet_folder: Path) -> None:
    few = opened(parquet_folder).shards()[0].identity

    assert opened(parquet_folder, "key", "views").shards()[0].identity == few


def test_columns_that_do_not_exist_are_left_to_the_check(parquet_folder: Path) -> None:
    source = opened(parquet_folder, "nope", id="neither")

    assert source.schema.names == ["key", "image", "views"]


def test_a_missing_library_is_told_with_the_command_that_installs_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from glm4v_batch.errors import JobError\n"
        "from glm4v_batch.job import DatasetSettings\n"
        "from glm4v_batch.sources import open_source\n"
        "try:\n    open_source(DatasetSettings(kind='dataset', path='x'), ())\n"
        "except JobError as error:\n    print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "Install it with: pip install 'glm4v-batch[datasets]'"
