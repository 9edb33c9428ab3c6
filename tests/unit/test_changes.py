"""What becomes of a source that changed after its rows were committed."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm4v_batch.asked import EVERYTHING, Asked
from glm4v_batch.changes import moved_sources
from glm4v_batch.errors import OutputError, SourceError
from glm4v_batch.executor import Event, Outcome, run
from glm4v_batch.job import Job, read_job
from glm4v_batch.parts import Part, PartInfo, list_parts
from glm4v_batch.plan import Plan, make_plan, open_job
from glm4v_batch.render import plan_as_text
from glm4v_batch.sources import Shard
from tests.conftest import MakeSource, image_bytes
from tests.e2e.command import write_job
from tests.e2e.test_run_echo import contents, rows_of, times

REDO = Asked(redo_changed=True)


@pytest.fixture
def job(tmp_path: Path, make_source: MakeSource) -> Job:
    return read_job(write_job(tmp_path / "job.yaml", make_source(50, shards=2), tmp_path / "out"))


def finish(job: Job, asked: Asked = EVERYTHING) -> Outcome:
    *_, outcome = run(open_job(job), asked)
    assert isinstance(outcome, Outcome)
    return outcome


def change(make_source: MakeSource, num_rows: int = 40) -> None:
    """Put a file of other rows, the first of them broken, where the first shard stands."""
    new = make_source(num_rows, name="new", broken=(0,)) / "shard-0.parquet"
    new.rename(new.parents[1] / "source" / "shard-0.parquet")


def test_a_changed_source_is_done_again_and_the_other_stays(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    before = times(tmp_path / "out")
    change(make_source)

    finish(job, REDO)

    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == [*range(40), *range(25)]
    assert rows[0]["status"] == "failed"
    kept = {name: time for name, time in times(tmp_path / "out").items() if "shard-1" in name}
    assert kept == {name: time for name, time in before.items() if "shard-1" in name}
    assert finish(job).report["rows"]["committed"] == 0


def test_the_result_is_that_of_a_fresh_folder(job: Job, tmp_path: Path, make_source: MakeSource) -> None:
    finish(job)
    change(make_source)
    finish(job, REDO)

    fresh = job.model_copy(update={"output": job.output.model_copy(update={"path": str(tmp_path / "fresh")})})
    finish(fresh)

    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_old_parts_are_gone_before_the_first_new_one_stands(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    change(make_source)
    events = run(open_job(job), REDO)

    seen: list[Event] = []
    for event in events:
        seen.append(event)
        if isinstance(event, Part):
            break
    events.close()

    plan = seen[0]
    assert isinstance(plan, Plan)
    assert plan.changed == {str(tmp_path / "source" / "shard-0.parquet"): 2}
    identities = [dict(p.info.source) for p in list_parts(tmp_path / "out") if "shard-0" in p.path.name]
    new = dict(open_job(job).shards[0].identity)
    assert identities
    assert all(identity == new for identity in identities)
    # Stopped here, a run that knows of no change goes on.
    assert finish(job).report["rows"]["committed"] == 20


def test_a_crash_while_old_parts_are_taken_away_mixes_nothing(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    change(make_source)
    next(p for p in (tmp_path / "out").glob("part-shard-0*")).unlink()

    with pytest.raises(SourceError, match=r"shard-0\.parquet"):
        make_plan(open_job(job))
    finish(job, REDO)

    assert [row["row"] for row in rows_of(tmp_path / "out")] == [*range(40), *range(25)]


def test_a_source_that_became_empty_loses_its_parts(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    change(make_source, 0)

    outcome = finish(job, REDO)

    assert outcome.exit_code == 0
    assert [row["row"] for row in rows_of(tmp_path / "out")] == list(range(25))


def test_a_changed_source_beyond_the_limit_keeps_its_parts(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    make_source(1, name="other").joinpath("shard-0.parquet").rename(tmp_path / "source" / "shard-1.parquet")
    before = contents(tmp_path / "out")

    finish(job, Asked(limit=10, redo_changed=True))

    assert contents(tmp_path / "out") == before


def test_redo_leaves_a_folder_without_changes_alone(job: Job, tmp_path: Path) -> None:
    finish(job)
    before = times(tmp_path / "out")

    assert finish(job, REDO).exit_code == 0

    assert times(tmp_path / "out") == before


def test_plan_shows_what_redo_would_do_and_changes_nothing(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    change(make_source)
    before = times(tmp_path / "out")

    text = plan_as_text(make_plan(open_job(job), REDO))

    assert "shard-0.parquet; its 2 parts of the old data taken away, its rows done again" in text
    assert "left         40 rows" in text
    assert times(tmp_path / "out") == before


def test_the_refusal_names_the_way_out(job: Job, make_source: MakeSource) -> None:
    finish(job)
    change(make_source)

    with pytest.raises(SourceError) as refused:
        make_plan(open_job(job))

    assert "run --on-changed redo" in refused.value.hint


def test_the_refusal_names_the_files_and_what_a_person_sees_of_their_change(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = read_job(write_job(tmp_path / "job.yaml", make_source(25, shards=25), tmp_path / "out"))
    finish(job)
    make_source(50, shards=25, broken=tuple(range(0, 50, 2)))

    with pytest.raises(SourceError) as refused:
        make_plan(open_job(job))

    first, *lines = str(refused.value).splitlines()
    assert first == "25 of the sources changed since their rows were committed:"
    assert len(lines) == 21
    assert lines[-1] == "  and 5 more"
    assert all(f"{tmp_path / 'source' / 'shard-'}" in line and len(line) < 200 for line in lines[:-1])
    assert all("size was " in line and "other content (footer, sample)" in line for line in lines[:-1])


def test_output_is_not_touched_before_the_plan_is_made(
    job: Job, tmp_path: Path, make_source: MakeSource
) -> None:
    finish(job)
    change(make_source)
    before = contents(tmp_path / "out")
    impossible = job.model_copy(update={"batching": job.batching.model_copy(update={"engine": "generate"})})

    with pytest.raises(OutputError, match="belongs to another job"):
        finish(impossible, REDO)

    assert contents(tmp_path / "out") == before


def test_a_source_that_is_gone_costs_nothing_for_each_of_its_rows(tmp_path: Path) -> None:
    def part(path: str, first_row: int) -> Part:
        identity = {"path": path, "sample_sha256": "the same"}
        return Part(tmp_path / "part", PartInfo("job", {}, identity, first_row, 10**12, 10**12, 0))

    shards = [Shard("new", 10**13, {"path": "new", "sample_sha256": "the same"})]
    gone = [part("gone", first_row) for first_row in (0, 2 * 10**12)]

    assert moved_sources(shards, [*gone, part("new", 10**12)]) == {"gone": "new"}
    nothing = replace(part("new", 5), info=replace(part("new", 5).info, num_rows=0))
    assert moved_sources(shards, [*gone, nothing]) == {"gone": "new"}
    assert moved_sources(shards, [*gone, part("new", 10**12 + 1)]) == {}
    assert moved_sources(shards, [*gone, part("new", 10**12 - 1)]) == {}


def test_other_data_under_the_same_footer_is_refused(job: Job, tmp_path: Path) -> None:
    def write(first: int) -> int:
        images = [image_bytes(row, kind="BMP") for row in range(first, first + 4)]
        table = pa.table({"id": list("abcd"), "image": images, "title": list("efgh")})
        path = tmp_path / "source" / "shard-0.parquet"
        pq.write_table(table, path, write_statistics=False, compression="none", use_dictionary=False)
        return path.stat().st_size

    size = write(0)
    finish(job)

    assert write(100) == size
    with pytest.raises(SourceError, match=r"shard-0\.parquet: other content \(sample\)$"):
        make_plan(open_job(job))
