"""Whole runs on `datasets` data sets: the same answers, ids and resume as from Parquet."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest

from tests.conftest import MakeSource, image_bytes
from tests.e2e.command import AT_ONCE, run_command, write_job
from tests.e2e.test_run_echo import SLOW, contents, kill_when_committed, rows_of

NUM_ROWS = 90


@pytest.fixture
def by_kind(tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The `source` section for the same rows: as Parquet, local data set, stream and saved folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parquet = make_source(NUM_ROWS)
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(parquet), split="train", cache_dir=str(tmp_path / "c")
    )
    loaded.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    return {
        "parquet": f"source: {{kind: parquet, path: {parquet}, id: id}}",
        "local": f"source: {{kind: dataset, path: {parquet}, id: id}}",
        "stream": f"source: {{kind: dataset, path: {parquet}, id: id, streaming: true}}",
        "saved": f"source: {{kind: dataset, path: {tmp_path}/saved, id: id}}",
    }


def job_of(folder: Path, name: str, source: str, *, slow: bool = False) -> Path:
    path = write_job(folder / f"{name}.yaml", folder, folder / f"out-{name}", extra=SLOW if slow else ())
    lines = path.read_text().splitlines()
    path.write_text("\n".join(source if line.startswith("source:") else line for line in lines))
    return path


def answers(folder: Path) -> list[tuple[object, ...]]:
    return [(r["id"], r["row"], r["text"], r["title"], r["status"]) for r in rows_of(folder)]


def test_every_kind_of_data_set_gives_the_answers_of_parquet(tmp_path: Path, by_kind: dict[str, str]) -> None:
    for kind, source in by_kind.items():
        finished = run_command("run", job_of(tmp_path, kind, source))
        assert finished.returncode == 0, finished.stderr

    expected = answers(tmp_path / "out-parquet")
    assert len(expected) == NUM_ROWS
    for kind in ("local", "stream", "saved"):
        assert answers(tmp_path / f"out-{kind}") == expected, kind


@pytest.mark.parametrize("kind", ["local", "stream", "saved"])
def test_a_killed_run_of_a_data_set_goes_on_to_the_same_parts(
    tmp_path: Path, by_kind: dict[str, str], kind: str
) -> None:
    whole = job_of(tmp_path, "whole", by_kind[kind])
    killed = job_of(tmp_path, "killed", by_kind[kind], slow=True)

    assert run_command("run", whole).returncode == 0
    kill_when_committed(killed, tmp_path / "out-killed", 2)
    resumed = run_command("run", killed, *AT_ONCE)
    again = run_command("run", killed)

    assert resumed.returncode == 0, resumed.stderr
    assert contents(tmp_path / "out-killed") == contents(tmp_path / "out-whole")
    assert "Nothing to do" in again.stdout


def write_layouts(folder: Path) -> None:
    """The same three pictures and titles as `datasets` knows them: a folder, JSON lines, an archive."""
    for name in ("pictures", "lines", "archives"):
        (folder / name).mkdir()
    rows = [{"file_name": f"{row}.png", "title": f"title {row}"} for row in range(3)]
    for row in range(3):
        (folder / "pictures" / f"{row}.png").write_bytes(image_bytes(row))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [json.dumps({"image": row["file_name"], "title": row["title"]}) for row in rows]
    (folder / "lines" / "a.jsonl").write_text("\n".join(lines))
    with tarfile.open(folder / "archives" / "a.tar", "w") as archive:
        for row in range(3):
            for name, content in ((f"{row}.png", image_bytes(row)), (f"{row}.txt", b"title %d" % row)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def test_pictures_json_lines_and_archives_are_read_as_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_layouts(tmp_path)
    more: dict[str, list[str]] = {
        "pictures": [],
        "lines": [f"source.root={tmp_path}/pictures"],
        # Columns are called as the files of a record end.
        "archives": ["source.image=png", "prompt.user=Describe {txt}.", "output.columns=[txt]"],
    }

    texts = []
    for name, settings in more.items():
        job = job_of(tmp_path, name, f"source: {{kind: dataset, path: {tmp_path}/{name}, split: train}}")
        options = [option for setting in settings for option in ("--set", setting)]
        finished = run_command("run", job, *options)
        assert finished.returncode == 0, finished.stderr
        texts.append([row["text"] for row in rows_of(tmp_path / f"out-{name}")])

    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 3
