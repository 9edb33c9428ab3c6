"""All files that a path names are found, or it is said why one is not."""

import errno
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import JobError, SourceError
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources.listing import find_files


def found(path: object, own_output: Path | None = None) -> list[str]:
    return list(find_files(ParquetSettings(kind="parquet", path=str(path)), own_output)[1])


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wildcards_and_folders_leave_hidden_names_out_and_a_pattern_that_names_them_does_not(
    here: Path,
) -> None:
    touch(here, "s/a.parquet", "s/.upload.parquet", "s/_x.parquet", "s/_tmp/b.parquet", "s/n/c.parquet")

    assert found("s") == ["s/a.parquet", "s/n/c.parquet"]
    assert found("s/*.parquet") == ["s/a.parquet"]
    assert found("s/**/*.parquet") == ["s/a.parquet", "s/n/c.parquet"]
    assert found("s/*/*.parquet") == ["s/n/c.parquet"]
    assert found("s/_tmp/*.parquet") == ["s/_tmp/b.parquet"]
    assert found("s/_*.parquet") == ["s/_x.parquet"]
    assert found("./s/?.parquet") == ["s/a.parquet"]


@pytest.mark.parametrize("path", ["s//*.parquet", "s//a.parquet", "s//", "./s///*"])
def test_slashes_may_be_doubled(here: Path, path: str) -> None:
    touch(here, "s/a.parquet")

    assert found(path) == ["s/a.parquet"]


@pytest.mark.parametrize("name", ["br[1]", "q?x", "st*r"])
def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    touch(
        tmp_path,
        f"{name}/src/a.parquet",
        "br1/src/other.parquet",
        "qyx/src/other.parquet",
        "star/src/o.parquet",
    )

    inside = [f"{tmp_path}/{name}/src/a.parquet"]
    assert found(tmp_path / name) == inside
    monkeypatch.chdir(tmp_path / name)
    assert found("src/*.parquet") == found("src") == found("*/a.parquet") == ["src/a.parquet"]
    assert found("../*/src/a.parquet") == ["src/a.parquet"]


@pytest.fixture
def forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be listed, whoever runs the tests."""
    folder = tmp_path / "s" / "sub"
    touch(tmp_path / "s", "a.parquet", "sub/b.parquet")
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    return folder


@pytest.mark.parametrize("pattern", ["", "/**/*.parquet", "/*/*.parquet", "/s*/*.parquet", "/sub", "/sub/*"])
def test_a_folder_that_may_not_be_listed_is_an_error(forbidden: Path, pattern: str) -> None:
    with pytest.raises(SourceError, match="sub cannot be listed: Permission denied") as caught:
        found(f"{forbidden.parent}{pattern}")

    assert "permissions" in caught.value.hint


def test_a_folder_that_nobody_asks_for_may_be_forbidden(forbidden: Path) -> None:
    lost = forbidden.parent / "lost+found"
    forbidden.rename(lost)

    assert found(forbidden.parent / "*.parquet") == [str(forbidden.parent / "a.parquet")]
    assert found(forbidden.parent) == [str(forbidden.parent / "a.parquet")]


@pytest.mark.parametrize("pattern", ["t*/*.parquet", "t*/**", "[t]/b.parquet", "t*/**/b.*"])
def test_a_pattern_looks_only_where_it_may_match(forbidden: Path, pattern: str) -> None:
    touch(forbidden.parent, "t/b.parquet", "t/.b.parquet", "u/b.parquet")

    assert found(forbidden.parent / pattern) == [str(forbidden.parent / "t" / "b.parquet")]


def test_a_name_that_may_not_be_looked_at_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    monkeypatch.setattr(Path, "is_dir", lambda _: False)

    with pytest.raises(SourceError, match=r"a\.parquet cannot be listed: Permission denied"):
        found(tmp_path / "a.parquet")


def test_a_link_that_leads_nowhere_is_named(here: Path) -> None:
    touch(here, "s/a.parquet", "disk/b.parquet")
    (here / "s" / "b.parquet").symlink_to(here / "disk" / "b.parquet")
    assert found("s") == ["s/a.parquet", "s/b.parquet"]
    (here / "disk").rename(here / "unmounted")

    for path in ("s", "s/*.parquet"):
        with pytest.raises(SourceError, match=r"links that lead nowhere:\n.*s/b\.parquet"):
            found(path)


def test_folders_that_are_links_are_not_entered_unless_they_are_named(here: Path) -> None:
    touch(here, "s/a.parquet")
    (here / "s" / "again").symlink_to(here / "s")

    assert found("s") == ["s/a.parquet"]
    assert found("s/again") == ["s/again/a.parquet"]
    assert found("s/again/*.parquet") == ["s/again/a.parquet"]


def test_a_source_that_is_all_output_is_told_so(here: Path) -> None:
    touch(here, "s/a.parquet")

    for output in ("s", "."):
        with pytest.raises(SourceError, match=r"no files but those in output\.path"):
            found("s", Path(output))


def test_a_pattern_that_is_none_is_a_mistake_of_the_job(here: Path) -> None:
    touch(here, "s/a.parquet")

    with pytest.raises(JobError, match=r"source\.path s/a\*\*/x is no pattern"):
        found("s/a**/x")


@pytest.fixture
def remote() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    for name in ("a_b.parquet", "_x.parquet", "sub/b.parquet", ".tmp/c.parquet"):
        memory.pipe(f"/listing/s[1]/{name}", b"")
        memory.pipe(f"/listing/s/{name}", b"")
    yield "memory://listing/s"
    memory.rm("/listing", recursive=True)


def test_elsewhere_the_same_names_are_found(remote: str) -> None:
    def names(path: str) -> list[str]:
        return [name.removeprefix("memory:///listing/s/") for name in found(path)]

    assert names(remote) == names(f"{remote}/**/*.parquet") == ["a_b.parquet", "sub/b.parquet"]
    assert names(f"{remote}/*.parquet") == names(f"{remote}/a_b.parquet") == ["a_b.parquet"]
    assert names(f"{remote}/_*.parquet") == ["_x.parquet"]
    assert len(found(f"{remote}[1]")) == 2


@pytest.mark.parametrize("chain", ["zip://*.parquet::{}/x.zip", "zip://::{}/x.zip"])
def test_within_an_archive_the_same_names_are_found(tmp_path: Path, chain: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a_b.parquet", "ab.parquet", "_h.parquet"):
            archive.writestr(name, b"")

    names = [name.split("://")[1].split("::")[0] for name in found(chain.format(tmp_path))]

    assert names == ["a_b.parquet", "ab.parquet"]


def test_a_chain_that_keeps_copies_finds_the_same_names(tmp_path: Path) -> None:
    touch(tmp_path / "d", "ab_def.parquet", "_x/a.parquet")

    (name,) = found(f"simplecache::file://{tmp_path}/d/**/*.parquet")

    assert name.endswith("d/ab_def.parquet")


PARTS = st.sampled_from(
    ["a", "b", "a.parquet", "ab.parquet", "b[1]", "*", "?", "a*", "[ab]", "*.parquet", "**"]
)


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_patterns_find_here_what_they_find_by_fsspec(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    root = tmp_path_factory.getbasetemp() / "tree"
    if not root.exists():
        touch(
            root, "a.parquet", "a/ab.parquet", "a/b/a.parquet", "b/a/b/ab.parquet", "b[1]/a.parquet", "b1/a"
        )
    pattern = f"{root}/{'/'.join(parts)}"
    if Path(pattern).is_dir():
        return
    local = fsspec.filesystem("file")
    expected = [path for path in sorted(local.glob(pattern)) if local.isfile(path)]
    if Path(pattern).is_file():  # what exists is meant by its name, even by b[1]/a.parquet
        expected = [pattern]

    try:
        ours = found(pattern)
    except SourceError:
        ours = []

    assert ours == expected
