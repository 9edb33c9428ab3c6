"""What this user may not read is told as that: not by a traceback, nor as damage."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm4v_batch.checkpoint import identity, locate, read_checkpoint, stored_tensors
from glm4v_batch.errors import JobError, SourceError
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources import RecordColumns, Source, check_root, open_source
from glm4v_batch.sources.dataset import _is_here

TINY = Path(__file__).parents[2] / "data" / "tiny-glm4v"
NOBODY = 65534


@contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    """For as long as it is entered, *path* has the permissions *mode*, and this process obeys them."""
    before, user = path.stat().st_mode, os.geteuid()
    path.chmod(mode)
    try:
        if user == 0:  # whom no permissions bind
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        path.chmod(before)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative in here: the folders above are pytest's own, which let no other user in."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model() -> Path:
    return Path(shutil.copytree(TINY, "above/model"))


def test_a_data_set_that_nobody_may_look_for_is_not_called_missing() -> None:
    Path("above/saved").mkdir(parents=True)

    with closed(Path("above")):
        assert _is_here("above/saved")
    assert not _is_here("above/other")
    assert _is_here("x" * 300)  # the system says that the name is too long, and no more


def refusal(path: Path | str) -> str:
    return f"The checkpoint {path} cannot be read: Permission denied."


@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_a_model_folder_that_lets_nobody_in_is_a_job_error(model: Path, mode: int) -> None:
    with closed(model, mode), pytest.raises(JobError) as caught:
        read_checkpoint(model)

    assert str(caught.value) == refusal(model)
    assert "permissions" in caught.value.hint


@pytest.mark.parametrize("look", [read_checkpoint, lambda folder: locate(str(folder), None)])
def test_a_model_below_a_folder_that_lets_nobody_in_is_a_job_error(model: Path, look: Any) -> None:
    with closed(model.parent), pytest.raises(JobError) as caught:
        look(model)

    assert str(caught.value) == refusal(model)
    assert "permissions" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ],
)
def test_a_model_file_that_may_not_be_read_is_named_and_not_called_damaged(model: Path, name: str) -> None:
    with closed(model / name), pytest.raises(JobError) as caught:
        identity(read_checkpoint(model))

    assert str(caught.value) == refusal(model / name)
    assert "permissions" in caught.value.hint
    assert "ownload" not in caught.value.hint


def test_a_model_folder_that_may_be_entered_but_not_listed_is_read(model: Path) -> None:
    with closed(model, 0o711):
        checkpoint = read_checkpoint(model)

    assert checkpoint.weight_files == (model / "model.safetensors",)


def test_a_link_into_a_folder_that_lets_nobody_in_tells_of_the_way_there(model: Path) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    (model / "tokenizer.json").rename(blobs / "tokenizer.json")
    (model / "tokenizer.json").symlink_to("../blobs/tokenizer.json")

    with closed(blobs), pytest.raises(JobError) as caught:
        read_checkpoint(model)

    assert str(caught.value) == refusal(model)
    assert "folders that lead to them" in caught.value.hint


def test_weights_under_a_name_that_no_file_can_have_are_missing(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "no\\u0000name"}}')

    with pytest.raises(JobError, match="lacks 1 of 1 weight files"):
        read_checkpoint(model)


def test_weights_that_may_no_longer_be_read_are_a_job_error(model: Path) -> None:
    weights = model / "model.safetensors"

    with closed(weights), pytest.raises(JobError) as caught:
        stored_tensors(weights)

    assert str(caught.value) == refusal(weights)


def test_trouble_other_than_permissions_is_told_as_what_it_is(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_disk(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoint = read_checkpoint(model)
    monkeypatch.setattr(hashlib, "file_digest", broken_disk)

    with pytest.raises(JobError) as caught:
        identity(checkpoint)

    assert str(caught.value) == f"The checkpoint {model} cannot be read: Input/output error."
    assert "permissions" not in caught.value.hint


@pytest.fixture
def pictures() -> Path:
    folder = Path("above/pictures")
    folder.mkdir(parents=True)
    return folder


def source_with_root(root: str) -> Source:
    pq.write_table(pa.table({"id": ["a"], "image": ["a.png"]}), "source.parquet")
    settings = ParquetSettings(kind="parquet", path="source.parquet", root=root)
    return open_source(settings, RecordColumns())


@pytest.mark.parametrize("obstacle", ["above", "above/pictures"])
def test_a_root_that_may_not_be_entered_is_unreadable_input(pictures: Path, obstacle: str) -> None:
    source = source_with_root(str(pictures))

    with closed(Path(obstacle)), pytest.raises(SourceError) as caught:
        check_root(source, "image")

    assert str(caught.value).startswith(f"source.root {pictures} cannot be entered: Permission denied,")
    assert "permissions" in caught.value.hint


def test_a_root_that_may_be_entered_but_not_listed_is_taken(pictures: Path) -> None:
    source = source_with_root(str(pictures))

    with closed(pictures, 0o711):
        check_root(source, "image")


@pytest.mark.parametrize(
    ("root", "trouble"),
    [
        ("source.parquet", "is not a folder"),
        ("nothing", "is not a folder"),
        ("x" * 300, "cannot be looked up: File name too long"),
    ],
)
def test_a_root_that_is_no_folder_is_told_with_the_reason(root: str, trouble: str) -> None:
    with pytest.raises(SourceError, match=trouble):
        check_root(source_with_root(root), "image")
