"""What is left to do, and which settings make a folder another job's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from glm4v_batch.asked import Asked
from glm4v_batch.checkpoint import read_checkpoint
from glm4v_batch.errors import JobError, OutputError, SourceError
from glm4v_batch.executor import Outcome, run
from glm4v_batch.job import Job, read_job
from glm4v_batch.output import fingerprint
from glm4v_batch.plan import OpenJob, make_plan, open_job, text_settings
from tests.conftest import MakeSource, image_bytes
from tests.e2e.command import MODEL, write_job

# Each setting with another value, and whether the text or the columns of a part can change with it.
OTHER_VALUES: dict[str, tuple[Any, bool]] = {
    "name": ("other", False),
    "source.path": ("other", False),
    "source.root": ("other", False),
    "source.id": ("key", True),
    "source.image": ("photo", True),
    "prompt.system": ("Be brief.", True),
    "prompt.user": ("Count.", True),
    "model.name": ("other", False),  # its files' hashes count instead
    "model.revision": ("abc", False),
    "model.dtype": ("bfloat16", True),
    "images.max_image_pixels": (1_000_000, False),
    "images.max_image_bytes": (1_000_000, False),
    "images.min_pixels": (5000, True),
    "images.max_pixels": (50_000, True),
    "generation.max_new_tokens": (7, True),
    "generation.max_new_tokens_column": ("length", True),
    "generation.temperature": (0.5, True),
    "generation.top_p": (0.5, True),
    "generation.top_k": (5, True),
    "generation.repetition_penalty": (1.5, True),
    "generation.seed": (5, True),
    "devices.use": ("cpu", False),
    "devices.layout": ("balanced", False),
    "devices.gpus_per_replica": (2, False),
    "devices.memory_fraction": (0.5, False),
    "devices.memory_limit_gib": (24.0, False),
    "devices.offload": ("cpu", False),
    "batching.engine": ("echo", True),
    "batching.max_batch_size": (5, False),
    "batching.echo_seconds": (1.0, False),
    "batching.echo_replicas": (2, False),
    "output.path": ("other", False),
    "output.rows_per_part": (5, False),
    "output.columns": (("title",), True),
    "limits.failed_fraction": (0.5, False),
    "limits.failed_window": (10, False),
}
ONLY_ONE_VALUE = {"source.kind"}


@pytest.fixture
def job(tmp_path: Path, make_source: MakeSource) -> Job:
    return read_job(write_job(tmp_path / "job.yaml", make_source(50, shards=2), tmp_path / "out"))


def settings_of(model: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, value in model:
        if isinstance(value, BaseModel):
            yield from settings_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def with_value(job: Job, setting: str, value: Any) -> Job:
    section, _, key = setting.rpartition(".")
    if not section:
        return job.model_copy(update={key: value})
    return job.model_copy(update={section: getattr(job, section).model_copy(update={key: value})})


def test_every_setting_is_judged_for_the_fingerprint(job: Job) -> None:
    assert set(settings_of(job)) == {*OTHER_VALUES, *ONLY_ONE_VALUE}


@pytest.mark.parametrize("setting", OTHER_VALUES)
def test_the_fingerprint_changes_with_what_can_change_the_text_and_nothing_else(
    job: Job, setting: str
) -> None:
    value, counts = OTHER_VALUES[setting]
    plain = with_value(job, "batching.engine", "auto") if setting == "batching.engine" else job
    plain = with_value(plain, "output.columns", ())
    checkpoint = read_checkpoint(MODEL)

    one, other = (text_settings(j, checkpoint) for j in (plain, with_value(plain, setting, value)))

    assert (fingerprint(one) != fingerprint(other)) == counts


def finish(opened: OpenJob, limit: int | None = None) -> Outcome:
    *_, outcome = run(opened, Asked(limit=limit))
    assert isinstance(outcome, Outcome)
    return outcome


def respelled(job: Job, path: Path) -> OpenJob:
    return open_job(with_value(job, "source.path", str(path)))


def test_another_spelling_of_the_path_does_no_row_again(job: Job, tmp_path: Path) -> None:
    finish(open_job(job), limit=30)
    (tmp_path / "link").symlink_to(tmp_path / "source")

    plan = make_plan(respelled(job, tmp_path / "link"))

    assert plan.num_left == 20
    assert len(plan.moved) == 2
    assert plan.vanished == ()
    assert finish(respelled(job, tmp_path / "link")).report["rows"]["committed"] == 20
    assert make_plan(open_job(job)).num_left == 0


def test_a_moved_source_goes_on_at_its_new_place(job: Job, tmp_path: Path) -> None:
    finish(open_job(job), limit=10)

    (tmp_path / "source").rename(tmp_path / "elsewhere")

    assert make_plan(respelled(job, tmp_path / "elsewhere")).num_left == 40


def test_two_files_of_the_same_rows_are_two_sources(job: Job, tmp_path: Path) -> None:
    shard = tmp_path / "source" / "shard-0.parquet"
    (tmp_path / "source" / "shard-7.parquet").write_bytes(shard.read_bytes())

    outcome = finish(open_job(job))

    assert outcome.report["rows"]["committed"] == 75
    assert make_plan(open_job(job)).num_left == 0


def test_among_equal_files_a_renamed_one_is_the_one_without_parts(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "a.parquet").write_bytes((folder / "shard-0.parquet").read_bytes())
    finish(open_job(job))

    (folder / "shard-0.parquet").rename(folder / "z.parquet")

    assert make_plan(open_job(job)).num_left == 0


def test_a_different_file_with_an_equal_footer_is_done(job: Job, tmp_path: Path) -> None:
    def write(name: str, first: int) -> None:
        images = [image_bytes(row, kind="BMP") for row in range(first, first + 4)]
        table = pa.table({"id": list("abcd"), "image": images, "title": list("efgh")})
        pq.write_table(table, folder / name, write_statistics=False, compression="none", use_dictionary=False)

    folder = tmp_path / "equal"
    folder.mkdir()
    write("day1.parquet", 0)
    finish(respelled(job, folder))

    (folder / "day1.parquet").unlink()
    write("day2.parquet", 100)

    plan = make_plan(respelled(job, folder))
    assert (plan.num_left, plan.vanished) == (4, (str(folder / "day1.parquet"),))


def test_a_changed_source_is_refused_with_what_changed(job: Job, make_source: MakeSource) -> None:
    finish(open_job(job))
    make_source(60, shards=2)

    with pytest.raises(
        SourceError,
        match=r"shard-0\.parquet: size was [\d,]+ and is [\d,]+, other content \(footer, sample\)\n",
    ):
        make_plan(open_job(job))


def test_a_copied_part_is_refused_with_both_names(job: Job, tmp_path: Path) -> None:
    finish(open_job(job))
    part = next((tmp_path / "out").glob("part-*.parquet"))
    (tmp_path / "out" / "part-copy.parquet").write_bytes(part.read_bytes())

    with pytest.raises(OutputError, match=rf"{part.name} and part-copy|part-copy\.parquet and {part.name}"):
        make_plan(open_job(job))


def test_an_output_below_its_source_does_not_feed_on_itself(job: Job, tmp_path: Path) -> None:
    inside = with_value(
        with_value(job, "output.path", str(tmp_path / "source" / "out")),
        "source.path",
        str(tmp_path / "source"),
    )

    finish(open_job(inside))

    assert make_plan(open_job(inside)).num_left == 0
    assert make_plan(open_job(inside)).num_rows == 50


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("source.image", "title", "source.root is not set"),
        ("images.max_pixels", 10, "images.max_pixels"),
        ("generation.max_new_tokens", 999_999, "context"),
        ("generation.max_new_tokens_column", "title", "names title, a column of string"),
        ("generation.max_new_tokens_column", "titel", "Did you mean title"),
    ],
)
def test_what_would_fail_every_row_is_refused_before_the_model_loads(
    job: Job, setting: str, value: Any, message: str
) -> None:
    with pytest.raises(JobError, match=message):
        open_job(with_value(job, setting, value))


def test_a_folder_from_before_rows_had_lengths_of_their_own_is_gone_on_with(job: Job) -> None:
    settings = text_settings(job, read_checkpoint(MODEL))

    assert "generation.max_new_tokens" in settings
    assert "generation.max_new_tokens_column" not in settings


def test_a_root_that_is_not_there_is_unreadable_input(job: Job, tmp_path: Path) -> None:
    paths = with_value(job, "source.image", "title")

    with pytest.raises(SourceError, match="is not a folder"):
        open_job(with_value(paths, "source.root", str(tmp_path / "unmounted")))
