"""Failed rows are done again, and nothing else of their parts changes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from glm4v_batch.asked import EVERYTHING, Asked
from glm4v_batch.errors import OutputError
from glm4v_batch.executor import Event, Outcome, run
from glm4v_batch.job import Job, read_job
from glm4v_batch.parts import list_parts
from glm4v_batch.plan import Plan, make_plan, open_job
from glm4v_batch.render import outcome_as_text, plan_as_text
from glm4v_batch.retry import Replaced
from tests.conftest import image_bytes
from tests.e2e.command import write_job

ALL = Asked(retry=frozenset())
MISSING = Asked(retry=frozenset({"image_missing"}))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """50 rows with the paths of pictures, of which 3 are missing, 1 is no picture and 1 is null."""
    pictures, source = tmp_path / "pictures", tmp_path / "source"
    pictures.mkdir()
    source.mkdir()
    names = [f"{row}.png" for row in range(50)]
    for row in set(range(50)) - {3, 17, 41}:
        (pictures / names[row]).write_bytes(b"text" if row == 5 else image_bytes(row))
    columns = {"id": [f"id-{row}" for row in range(50)], "title": ["naïve"] * 50}
    table = pa.table({**columns, "image": [None if row == 30 else name for row, name in enumerate(names)]})
    pq.write_table(table, source / "shard.parquet", row_group_size=7)
    return read_job(write_job(tmp_path / "job.yaml", source, tmp_path / "out"), [f"source.root={pictures}"])


def finish(job: Job, asked: Asked = EVERYTHING) -> Outcome:
    *_, outcome = run(open_job(job), asked)
    assert isinstance(outcome, Outcome)
    return outcome


def mend(job: Job, *rows: int) -> None:
    for row in rows:
        Path(job.source.root or "", f"{row}.png").write_bytes(image_bytes(row))


def table_of(job: Job) -> pa.Table:
    parts = list_parts(Path(job.output.path))
    return pa.concat_tables(pq.read_table(part.path, partitioning=None) for part in parts).sort_by("row")


def failures(job: Job) -> dict[int, str]:
    rows = table_of(job).filter(pc.field("status") == "failed")
    return dict(zip(rows["row"].to_pylist(), rows["error_code"].to_pylist(), strict=True))


def test_mended_rows_get_answers_and_all_others_keep_every_column(job: Job) -> None:
    finish(job)
    before = table_of(job)
    mend(job, 3, 41)

    outcome = finish(job, ALL)

    after = table_of(job)
    assert failures(job).keys() == {5, 17, 30}
    assert outcome.exit_code == 3
    assert outcome.report["rows"] == {"ok": 2, "failed": 3, "committed": 5}
    others = pc.invert(pc.is_in(before["row"], pa.array([3, 41])))
    assert after.filter(others).equals(before.filter(others))
    assert after.select(["id", "source", "row", "title"]).equals(
        before.select(["id", "source", "row", "title"])
    )
    assert after.schema.equals(before.schema)


def test_a_mended_folder_equals_one_that_never_failed(job: Job, tmp_path: Path) -> None:
    finish(job)
    mend(job, 3, 5, 17, 41)
    finish(job, ALL)

    whole = job.model_copy(update={"output": job.output.model_copy(update={"path": str(tmp_path / "whole")})})
    finish(whole)

    assert table_of(job).equals(table_of(whole))
    assert [p.info for p in list_parts(tmp_path / "out")] == [p.info for p in list_parts(tmp_path / "whole")]


def test_only_rows_of_the_code_asked_for_are_done_again(job: Job) -> None:
    finish(job)
    mend(job, 3, 5, 17, 41)

    finish(job, MISSING)

    assert failures(job).keys() == {5, 30}


def test_when_the_last_failure_is_mended_the_exit_code_says_so(job: Job) -> None:
    finish(job, Asked(limit=20))
    mend(job, 3, 5, 17)

    assert finish(job, ALL).exit_code == 0
    assert finish(job, ALL).report["rows"]["committed"] == 0


def test_parts_without_chosen_rows_stay_untouched(job: Job) -> None:
    finish(job)
    before = {path: path.stat().st_mtime_ns for path in Path(job.output.path).glob("part-*")}
    mend(job, 41)

    finish(job, Asked(retry=frozenset({"image_format"})))

    changed = [path for path, mtime in before.items() if path.stat().st_mtime_ns != mtime]
    assert [list_parts(path.parent)[0].info.first_row for path in changed] == [0]


def test_a_retry_left_half_way_keeps_what_it_replaced_and_the_rest_failed(job: Job) -> None:
    finish(job)
    mend(job, 3, 5, 17, 41)
    events = run(open_job(job), ALL)

    replaced = next(event for event in events if isinstance(event, Replaced))
    events.close()

    assert replaced.part.info.num_failed == 0
    assert failures(job).keys() == {30, 41}
    assert len(table_of(job)) == 50
    finish(job, ALL)
    assert failures(job).keys() == {30}


def test_new_rows_are_left_to_a_plain_run_and_named(job: Job) -> None:
    finish(job, Asked(limit=20))

    outcome = finish(job, ALL)

    assert len(table_of(job)) == 20
    assert "30 rows not done yet: run without --retry-failed" in outcome_as_text(outcome, "run")


def test_a_limit_is_about_rows_of_the_source(job: Job) -> None:
    finish(job)
    mend(job, 3, 17, 41)

    outcome = finish(job, Asked(limit=20, retry=frozenset()))

    assert failures(job).keys() == {5, 30, 41}
    assert "2 failed rows left as they are" in outcome_as_text(outcome, "run")


def test_a_moved_source_is_read_at_its_new_place_and_keeps_its_name_in_the_part(
    job: Job, tmp_path: Path
) -> None:
    finish(job)
    before = table_of(job)
    mend(job, 3)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    moved = job.model_copy(
        update={"source": job.source.model_copy(update={"path": str(tmp_path / "elsewhere")})}
    )

    finish(moved, ALL)

    assert 3 not in failures(job)
    assert table_of(job).select(["id", "source"]).equals(before.select(["id", "source"]))


def test_failed_rows_of_a_source_that_is_gone_are_left_and_named(job: Job, tmp_path: Path) -> None:
    finish(job)
    other = tmp_path / "source" / "other.parquet"
    (tmp_path / "source" / "shard.parquet").unlink()
    pq.write_table(pa.table({"id": ["x"], "image": ["1.png"], "title": ["t"]}), other)

    outcome = finish(job, ALL)

    assert outcome.exit_code == 3
    assert "5 failed rows left as they are: their source is gone" in outcome_as_text(outcome, "run")


def test_a_damaged_part_is_named_and_no_row_is_lost(job: Job) -> None:
    finish(job)
    part = list_parts(Path(job.output.path))[0].path
    data = bytearray(part.read_bytes())
    data[4:400] = bytes(396)
    part.write_bytes(data)

    with pytest.raises(OutputError, match=part.name):
        finish(job, ALL)

    assert part.read_bytes() == bytes(data)


def test_plan_shows_what_would_be_done_again(job: Job) -> None:
    finish(job)

    plan = make_plan(open_job(job), MISSING)

    assert plan.num_left == 4
    text = plan_as_text(plan)
    assert "4 failed rows to do again; failed are 4 × image_missing, 1 × " in text


def test_the_plan_comes_first_and_the_outcome_last(job: Job) -> None:
    finish(job)

    events: list[Event] = list(run(open_job(job), ALL))

    assert isinstance(events[0], Plan)
    assert sum(isinstance(event, Replaced) for event in events) == 3
    assert isinstance(events[-1], Outcome)


def test_a_retry_that_its_disk_ends_says_how_many_rows_were_done_again(job: Job) -> None:
    finish(job)
    mend(job, 3, 17, 41)
    out = Path(job.output.path)
    events = run(open_job(job), MISSING)
    first = next(event for event in events if isinstance(event, Replaced))
    (out / ".glm4v-batch" / "lock").unlink()

    with pytest.raises(OutputError) as ended:
        list(events)

    assert ended.value.progress == f"{first.num_rows} of 4 failed rows in {out} were done again by then."
