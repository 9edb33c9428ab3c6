"""Files and names: exclusive, and durable in the right order."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4v_batch.durable import (
    SyncError,
    discard,
    free_bytes,
    is_regular,
    make_folder,
    publish,
    sync_folder,
    write_synced,
)


def refuse(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    path = tmp_path / "temporary"
    path.write_bytes(b"ours")
    return path


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EMLINK], ids=["links", "no links", "too many"])
def test_a_file_gets_its_name_whatever_the_file_system_thinks_of_links(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    if error is not None:
        monkeypatch.setattr(os, "link", refuse(error))
    final = temporary.with_name("final")

    way = publish(temporary, final)

    assert way == ("link" if error is None else "renameat2")
    assert final.read_bytes() == b"ours"


@pytest.mark.parametrize("error", [None, errno.EPERM], ids=["links", "no links"])
def test_a_name_that_is_taken_is_refused_and_both_files_stay(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    if error is not None:
        monkeypatch.setattr(os, "link", refuse(error))
    final = temporary.with_name("final")
    final.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        publish(temporary, final)

    assert (temporary.read_bytes(), final.read_bytes()) == (b"ours", b"theirs")


def test_other_trouble_with_a_link_is_not_taken_for_a_missing_feature(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        publish(temporary, temporary.with_name("final"))

    assert not temporary.with_name("final").exists()


def test_a_failing_sync_is_told_from_a_failing_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))

    with pytest.raises(SyncError) as caught:
        write_synced(tmp_path / "file", b"data")

    assert caught.value.errno == errno.EIO


def test_a_file_that_is_there_is_not_written_over(temporary: Path) -> None:
    with pytest.raises(FileExistsError):
        write_synced(temporary, b"other")

    assert temporary.read_bytes() == b"ours"


def test_each_folder_is_durable_before_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, mkdir = os.fsync, os.mkdir

    def spy_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').resolve().name}")
        fsync(descriptor)

    def spy_mkdir(path: Path, mode: int = 0o777) -> None:
        calls.append(f"mkdir {Path(path).name}")
        mkdir(path, mode)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "mkdir", spy_mkdir)
    (tmp_path / "a").mkdir()
    calls.clear()

    make_folder(tmp_path / "a" / "b" / "c")

    # The name of `a` too: whoever made it may have died before it was synced.
    assert calls == [f"fsync {tmp_path.name}", "mkdir b", "fsync a", "mkdir c", "fsync b"]


def test_only_files_are_regular(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(temporary)
    os.mkfifo(tmp_path / "pipe")

    assert is_regular(temporary)
    assert not any(is_regular(path) for path in (tmp_path, tmp_path / "link", tmp_path / "pipe"))


def test_a_disk_tells_its_room(tmp_path: Path) -> None:
    assert (free_bytes(tmp_path) or 0) > 0


def test_a_folder_that_is_gone_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "gone")


def test_what_cannot_be_discarded_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    discard(tmp_path / "folder")
    discard(tmp_path / "never was")

    assert (tmp_path / "folder").is_dir()
