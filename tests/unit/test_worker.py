"""Records on their way from the source to the decoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from glm4v_batch.job import read_job
from glm4v_batch.output import Output
from glm4v_batch.plan import make_plan, open_job
from glm4v_batch.types import Chunk, Record
from glm4v_batch.worker import new_records
from tests.conftest import MakeSource
from tests.e2e.command import write_job


class Expecting:
    """Keeps what it is told of, as an output does."""

    def __init__(self) -> None:
        self.told: list[tuple[Chunk, Record]] = []

    def begin(self, chunk: Chunk, source: Mapping[str, str | int]) -> None:
        """Nothing to prepare."""

    def expect(self, chunk: Chunk, record: Record) -> None:
        self.told.append((chunk, record))


def test_look_ahead_sees_of_new_records_what_the_output_keeps_of_them(
    tmp_path: Path, make_source: MakeSource
) -> None:
    plan = make_plan(open_job(read_job(write_job(tmp_path / "job.yaml", make_source(9), tmp_path / "out"))))
    output = Expecting()
    chunks = plan.opened.source.chunks(plan.opened.shards[0], [range(9)], 4)

    records = list(new_records(plan, chunks, cast(Output, cast(Any, output))))

    assert records == output.told
    assert [record.passed.column("title").to_pylist() for _, record in records if record.passed] == [
        [f"title {row}"] for row in range(9)
    ]
