"""The output folder: whole chunks, one job, one run at a time."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import OutputError, OutputLockedError
from glm4v_batch.output import (
    Lock,
    Output,
    _column,
    committed_parts,
    describe,
    fingerprint,
    locked,
    readable,
)
from glm4v_batch.parts import STATE_FOLDER
from glm4v_batch.types import Chunk
from tests.builders import completion, failure, record

SETTINGS = {"prompt.user": "Describe.", "generation.max_new_tokens": 64}
CHUNK = Chunk("a.parquet", first_row=10, num_rows=3)
IDENTITY: dict[str, str | int] = {"path": "a.parquet", "size": 99}


def output(lock: Lock) -> Output:
    return Output(lock, SETTINGS, [pa.field("title", pa.string())])


def begun(lock: Lock) -> Output:
    made = output(lock)
    made.begin(CHUNK, IDENTITY)
    for row in CHUNK.rows:
        made.expect(CHUNK, record(row, CHUNK, title=f"title {row}"))
    return made


def test_a_chunk_is_committed_when_its_last_row_comes_and_not_before(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        out = begun(lock)

        assert out.add(completion(12, CHUNK)) is None
        assert out.add(completion(10, CHUNK)) is None
        assert list(tmp_path.glob("*.parquet")) == []
        part = out.add(failure(11, CHUNK))

    assert part is not None
    assert part.path.exists()
    assert len(out) == 0


@given(values=st.lists(st.none() | st.text(st.characters(codec="utf-8")), max_size=9))
def test_columns_of_text_are_what_arrow_makes_of_them(values: list[str | None]) -> None:
    assert _column(values, pa.string()).equals(pa.array(values, pa.string()))


@given(values=st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=9))
def test_columns_of_numbers_are_what_arrow_makes_of_them(values: list[int | None]) -> None:
    assert _column(values, pa.int64()).equals(pa.array(values, pa.int64()))


class _FullBuilder:
    """Leaves out, as Arrow's own does, what it has no room for."""

    def __init__(self) -> None:
        self._values: list[str | None] = []

    def append_values(self, values: Iterable[str | None]) -> None:
        self._values = [value for value in values if value != "large"]

    def finish(self) -> pa.Array:
        return pa.array(self._values, pa.string())


def test_texts_for_which_there_is_no_room_at_once_are_kept_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pa.lib, "StringBuilder", _FullBuilder)

    assert _column(["a", "large", None], pa.string()).to_pylist() == ["a", "large", None]


def test_a_number_among_texts_is_our_mistake_and_no_text() -> None:
    with pytest.raises(TypeError):
        _column(["a", 5], pa.string())


def test_answers_and_failures_stand_in_row_order_with_their_passed_columns(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        out = begun(lock)
        parts = [
            out.add(r) for r in (completion(12, CHUNK, "c"), failure(11, CHUNK), completion(10, CHUNK, "a"))
        ]

    assert parts[-1] is not None
    rows = pq.read_table(parts[-1].path).to_pylist()
    assert [(r["row"], r["status"], r["text"], r["title"]) for r in rows] == [
        (10, "ok", "a", "title 10"),
        (11, "failed", None, "title 11"),
        (12, "ok", "c", "title 12"),
    ]
    assert (rows[1]["error_stage"], rows[1]["error_code"]) == ("decode", "image_truncated")
    assert (parts[-1].info.num_ok, parts[-1].info.num_failed) == (2, 1)


@pytest.mark.parametrize(
    ("column", "mended"),
    [
        (pa.array([b"good", b"\xff", None]).cast(pa.string(), safe=False), ["good", "\ufffd", None]),
        (
            pa.ListArray.from_arrays([0, 1, 2], pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False)),
            [["a"], None],
        ),
        (
            pa.DictionaryArray.from_arrays(
                [0, 1, 0], pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False)
            ),
            ["a", "\ufffd", "a"],
        ),
    ],
)
def test_text_that_is_not_utf8_is_mended_whatever_holds_it(column: pa.Array, mended: list[object]) -> None:
    found = readable(pa.chunked_array([column]))

    assert found.to_pylist() == mended
    assert found.type == column.type


def test_a_second_run_is_refused_at_once_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(OutputLockedError, match=f"process {os.getpid()} on "),
        locked(tmp_path),
    ):
        pass


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from glm4v_batch.output import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        begin = time.monotonic()
        with pytest.raises(OutputLockedError, match=f"process {holder.pid}"), locked(tmp_path):
            pass
        assert time.monotonic() - begin < 30  # to wait for the lock would take a minute
        holder.kill()
        holder.wait()

    with locked(tmp_path):
        pass


def test_leftovers_are_removed_under_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    stale = tmp_path / STATE_FOLDER / "tmp" / "part-x.parquet.123"
    stale.write_bytes(b"half")

    with locked(tmp_path):
        assert not stale.exists()


def test_a_link_among_the_leftovers_goes_and_what_it_points_to_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        (tmp_path / "out" / STATE_FOLDER / "tmp" / "link").symlink_to(kept)

    assert list((tmp_path / "out" / STATE_FOLDER / "tmp").iterdir()) == []
    assert (kept / "file").exists()


@pytest.mark.parametrize("name", [STATE_FOLDER, f"{STATE_FOLDER}/tmp", f"{STATE_FOLDER}/lock"])
def test_a_link_in_place_of_our_own_state_is_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept"
    (kept / "tmp").mkdir(parents=True)
    for file in (kept / "file", kept / "tmp" / "file"):
        file.write_text("theirs")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(kept / "file" if link.name == "lock" else kept)

    with pytest.raises(OutputError, match="is a link") as caught, locked(tmp_path / "out"):
        pass

    assert str(link) in str(caught.value)
    assert "Remove the link" in str(caught.value.hint)
    assert sorted(path.name for path in kept.rglob("*")) == ["file", "file", "tmp"]
    assert (kept / "file").read_text() == (kept / "tmp" / "file").read_text() == "theirs"


def test_a_link_that_takes_the_place_of_our_state_during_a_run_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    temporary = tmp_path / "out" / STATE_FOLDER / "tmp"

    with locked(tmp_path / "out"):
        temporary.rmdir()
        temporary.symlink_to(kept)

    assert (kept / "file").exists()


def test_the_folder_is_left_tidy_however_a_run_ends(tmp_path: Path) -> None:
    def fail() -> None:
        with locked(tmp_path):
            (tmp_path / STATE_FOLDER / "tmp" / "offload-0").mkdir()
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert list((tmp_path / STATE_FOLDER / "tmp").iterdir()) == []
    assert (tmp_path / STATE_FOLDER / "lock").read_text() == ""


def test_a_folder_that_was_removed_takes_no_more_parts(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with locked(folder) as lock:
        out = begun(lock)
        shutil.rmtree(folder)

        with pytest.raises(OutputError, match="No such file or directory") as caught:
            [out.add(completion(row, CHUNK)) for row in CHUNK.rows]

    assert "moved or removed" in caught.value.hint
    assert not folder.exists()


def test_a_folder_that_another_run_took_over_takes_no_more_parts(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with locked(folder) as lock:
        out = begun(lock)
        folder.rename(tmp_path / "away")
        with locked(folder):
            theirs = folder / STATE_FOLDER / "tmp" / "part-theirs"
            theirs.touch()
            with pytest.raises(OutputLockedError, match="its lock file was replaced"):
                [out.add(completion(row, CHUNK)) for row in CHUNK.rows]

            assert theirs.exists()
    assert list(folder.glob("*.parquet")) == []


def test_a_chunk_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        out = output(lock)

        with pytest.raises(OutputError, match="needs about"):
            out.begin(Chunk("a.parquet", 0, 2**50), IDENTITY)


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(OutputError, match="file is not a folder"), locked(tmp_path / "file" / "out"):
        pass


def test_a_folder_whose_name_the_locale_cannot_express_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the encoding of file names under this locale"):
        locked(tmp_path / "out\ud800").__enter__()

    assert list(tmp_path.iterdir()) == []


@contextmanager
def folder_of_a_user() -> Iterator[Path]:
    """A folder of the user that this process is meanwhile: not root, whom no permission keeps out."""
    user = os.geteuid()
    with TemporaryDirectory() as made:
        if user == 0:
            os.chown(made, 12345, -1)
            os.seteuid(12345)
        try:
            yield Path(made)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("lock", 0o444), ("tmp", 0o555), ("tmp/stale", 0o555), ("", 0o555), ("", 0o600), ("", 0)],
)
def test_what_may_not_be_written_is_named_though_it_is_hidden_in_a_folder_that_may(
    name: str, mode: int
) -> None:
    with folder_of_a_user() as folder:
        (folder / STATE_FOLDER / "tmp" / "stale" / "file").mkdir(parents=True)
        (folder / STATE_FOLDER / "lock").touch()
        closed = folder / STATE_FOLDER / name
        closed.chmod(mode)

        with pytest.raises(OutputError) as caught, locked(folder):
            describe(folder, {"name": "caption"}, SETTINGS)

        closed.chmod(0o700)
    assert str(caught.value) == f"{closed} cannot be written: Permission denied."
    assert caught.value.hint.startswith("Mend its permissions.")


def test_a_folder_in_place_of_the_lock_file_is_named(tmp_path: Path) -> None:
    lock = tmp_path / STATE_FOLDER / "lock"
    lock.mkdir(parents=True)

    with pytest.raises(OutputError, match=f"^{lock} cannot be written: Is a directory"), locked(tmp_path):
        pass


def test_parts_of_another_job_are_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        out = begun(lock)
        for row in CHUNK.rows:
            out.add(completion(row, CHUNK))

    with pytest.raises(OutputError) as caught:
        committed_parts(tmp_path, {**SETTINGS, "prompt.user": "Count the cats."})

    assert 'prompt.user was "Describe." and is "Count the cats."' in str(caught.value)
    assert "max_new_tokens" not in str(caught.value)


def test_the_fingerprint_does_not_depend_on_the_order_of_settings() -> None:
    assert fingerprint(SETTINGS) == fingerprint(dict(reversed(SETTINGS.items())))
    assert fingerprint(SETTINGS) != fingerprint({**SETTINGS, "generation.max_new_tokens": 65})


def test_the_job_is_described_for_people(tmp_path: Path) -> None:
    with locked(tmp_path):
        describe(tmp_path, {"name": "caption"}, SETTINGS)

    described = json.loads((tmp_path / STATE_FOLDER / "job.json").read_text())
    assert described["job"] == {"name": "caption"}
    assert described["fingerprint"] == fingerprint(SETTINGS)


@pytest.mark.parametrize("written", ["", "process 1 on another host since yesterday"])
def test_a_refusal_names_who_holds_the_lock_and_not_who_held_it(tmp_path: Path, written: str) -> None:
    with locked(tmp_path), (tmp_path / ".glm4v-batch" / "lock").open("w") as lock:
        lock.write(written)
        lock.flush()

        with (
            pytest.raises(OutputLockedError, match=f"held by another run: process {os.getpid()}\\."),
            locked(tmp_path),
        ):
            pass
