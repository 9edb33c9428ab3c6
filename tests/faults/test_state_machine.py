"""F7: any order of runs, crashes, second writers, other inputs, other prompts, more files and retries.

Hypothesis chooses the order. A crash is an image of the folder, taken while a run is under way and put
back when it is gone; what happens between two system calls is for F1.
"""

import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from glm4v_batch import executor
from glm4v_batch.asked import EVERYTHING, Asked
from glm4v_batch.errors import OutputError, OutputLockedError, SourceError
from glm4v_batch.executor import Event, Outcome
from glm4v_batch.job import read_job
from glm4v_batch.plan import Plan, open_job
from tests.conftest import image_bytes
from tests.e2e.command import MODEL
from tests.faults.conftest import Judge
from tests.faults.harness import WANTS_ALL
from tests.faults.runs import rows_of, stamps

NUM_EXAMPLES = 150 if WANTS_ALL else 5
NUM_STEPS = 25 if WANTS_ALL else 15
ROWS_PER_SHARD = 10

Place = tuple[str, int]
OFTEN = st.sampled_from([True, True, False])
GRIDS = st.sampled_from([3, 4, 7])


def picture_of(name: str) -> bytes:
    """The picture that belongs into the file *name*, unlike all others."""
    return image_bytes(zlib.crc32(name.encode()), (28, 28))


class Folder(RuleBasedStateMachine):
    """An output folder and its input; what the folder must hold is known from what was done to it."""

    # How often each kind of thing happened, over all folders of a test.
    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp())
        self.source, self.pictures, self.out = (self.base / name for name in ("source", "pictures", "out"))
        self.source.mkdir()
        self.pictures.mkdir()
        self.versions: dict[str, int] = {}
        self.missing: set[str] = set()
        # What must stand in the folder at least: the rows that a run said were committed.
        self.said: dict[Place, dict[str, Any]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    # What the input is

    def write(self, name: str, version: int) -> None:
        """A shard of ten rows; every version has pictures of its own, of which two are not there."""
        rows = range(ROWS_PER_SHARD)
        names = [f"{name}-{version}-{row}.png" for row in rows]
        for row in rows:
            if row in (2, 5):
                self.missing.add(names[row])
            else:
                (self.pictures / names[row]).write_bytes(picture_of(names[row]))
        titles = [f"title {version}-{row}" for row in rows]
        table = pa.table({"id": [f"{name}-{row}" for row in rows], "image": names, "title": titles})
        pq.write_table(table, self.source / f"{name}.parquet")
        self.versions[name] = version

    @initialize()
    def begin(self) -> None:
        self.write("a", 0)
        self.write("b", 0)

    @rule(name=st.sampled_from(["a", "b", "c", "d"]))
    def a_file_is_added(self, name: str) -> None:
        if name not in self.versions:
            self.write(name, 0)

    @rule(name=st.sampled_from(["a", "b"]))
    def a_file_changes(self, name: str) -> None:
        self.write(name, self.versions[name] + 1)

    @rule(share=st.integers(1, 3))
    def missing_pictures_come(self, share: int) -> None:
        for name in sorted(self.missing)[::share]:
            (self.pictures / name).write_bytes(picture_of(name))
            self.missing.remove(name)

    # What is done about it

    def run(self, asked: Asked = EVERYTHING, grid: int = 4, prompt: str = "{title}") -> Iterator[Event]:
        job = self.base / "job.yaml"
        job.write_text(
            "name: machine\n"
            f"source: {{kind: parquet, path: {self.source}, id: id, root: {self.pictures}}}\n"
            f'prompt: {{user: "{prompt}"}}\n'
            f"model: {{name: {MODEL}}}\n"
            "batching: {engine: echo, max_batch_size: 4}\n"
            f"output: {{path: {self.out}, rows_per_part: {grid}, columns: [title]}}\n"
        )
        return executor.run(open_job(read_job(job)), asked)

    def finish(self, events: Iterator[Event]) -> Outcome:
        *_, outcome = self.counted(events, "runs")
        assert isinstance(outcome, Outcome)
        self.learn()
        return outcome

    def counted(self, events: Iterator[Event], kind: str) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Plan):
                self.happened[kind] += 1
                self.happened["sources redone"] += len(event.changed)
                self.happened["rows retried"] += event.retries.num_rows if event.retries else 0
            yield event

    def learn(self) -> None:
        """What stands in the folder now has been said to be committed."""
        self.said = {(row["source"], row["row"]): row for row in rows_of(self.out)}

    def is_refused(self, asked: Asked) -> bool:
        """Whether *asked* meets a changed source, which must be refused without touching a part (I7)."""
        if asked.redo_changed or not self.stale():
            return False
        before = stamps(self.out)
        with pytest.raises(SourceError):
            list(self.run(asked))
        assert stamps(self.out) == before
        self.happened["changes refused"] += 1
        return True

    def stale(self) -> set[str]:
        """The sources whose rows in the folder are not of the version that stands there."""
        return {
            source
            for (source, _), row in self.said.items()
            if row["title"].split()[1].split("-")[0] != str(self.versions[Path(source).stem])
        }

    @rule(grid=GRIDS, limit=st.none() | st.integers(1, 25), redo=OFTEN)
    def a_run_ends(self, grid: int, limit: int | None, redo: bool) -> None:
        asked = Asked(limit=limit, redo_changed=redo)
        if self.is_refused(asked):
            return
        outcome = self.finish(self.run(asked, grid))
        if limit is None:
            self.assert_complete()
        failed = sum(row["status"] == "failed" for row in self.said.values())
        assert outcome.exit_code == (3 if failed else 0)
        assert outcome.num_failed == failed

    @rule(grid=GRIDS, redo=OFTEN, num_events=st.integers(1, 60))
    def a_run_crashes(self, grid: int, redo: bool, num_events: int) -> None:
        if self.is_refused(Asked(redo_changed=redo)):
            return
        with self.crashing(self.run(Asked(redo_changed=redo), grid), num_events):
            pass

    @precondition(lambda self: self.said)
    @rule(name=st.sampled_from(["a", "b"]), grid=GRIDS, num_events=st.integers(1, 40))
    def a_file_changes_and_doing_it_again_crashes(self, name: str, grid: int, num_events: int) -> None:
        self.write(name, self.versions[name] + 1)
        with self.crashing(self.run(Asked(redo_changed=True), grid), num_events):
            pass

    @rule(num_events=st.integers(1, 30))
    def a_retry_crashes(self, num_events: int) -> None:
        if not self.is_refused(Asked(retry=frozenset())):
            with self.crashing(self.run(Asked(retry=frozenset())), num_events):
                pass

    @rule()
    def a_second_run_is_refused_while_one_is_under_way(self) -> None:
        if self.is_refused(EVERYTHING):
            return
        with self.crashing(self.run(), 6):
            before = stamps(self.out)
            with pytest.raises(OutputLockedError):
                list(self.run())
            assert stamps(self.out) == before

    @precondition(lambda self: self.said)
    @rule()
    def another_prompt_is_refused(self) -> None:
        before = stamps(self.out)
        with pytest.raises(OutputError, match=r"prompt\.user was"):
            list(self.run(prompt="Not {title}"))
        assert stamps(self.out) == before

    @rule(code=st.sampled_from([None, "image_missing", "decoder_crashed"]))
    def failed_rows_are_retried(self, code: str | None) -> None:
        asked = Asked(retry=frozenset([code] if code else []))
        if self.is_refused(asked):
            return
        before = self.said
        self.finish(self.run(asked))
        assert self.said.keys() == before.keys()
        for place, row in self.said.items():
            is_mended = before[place]["status"] == "failed" and self.picture(row) not in self.missing
            if is_mended and code != "decoder_crashed":
                assert row["status"] == "ok", "a row whose picture has come is still failed after a retry"
            else:
                assert row == before[place], "a retry changed a row that it had no business with"

    @rule()
    def a_finished_job_is_run_again(self) -> None:
        if self.is_refused(EVERYTHING):
            return
        first = self.finish(self.run())
        before = stamps(self.out)
        again = self.finish(self.run())
        assert stamps(self.out) == before
        assert again.exit_code == first.exit_code
        self.assert_like_a_fresh_folder()

    @contextmanager
    def crashing(self, events: Iterator[Event], num_events: int) -> Generator[None, None, None]:
        """Take *num_events* of *events*; after the block the power is off, and the folder as it was then."""
        assert isinstance(events, Generator)
        for number, event in enumerate(self.counted(events, "crashes")):
            if number == num_events or isinstance(event, Outcome):
                break
        yield
        image = self.base / "image"
        shutil.copytree(self.out, image)
        events.close()
        # A run that has begun no work takes the folder that it made away again.
        shutil.rmtree(self.out, ignore_errors=True)
        image.rename(self.out)
        self.learn()

    # What must hold

    def picture(self, row: dict[str, Any]) -> str:
        stem, version = Path(row["source"]).stem, row["title"].split()[1].split("-")[0]
        return f"{stem}-{version}-{row['row']}.png"

    def assert_complete(self) -> None:
        places = {
            (str(self.source / f"{name}.parquet"), row)
            for name in self.versions
            for row in range(ROWS_PER_SHARD)
        }
        assert set(self.said) == places, "a finished run left rows out"
        assert not self.stale()

    def assert_like_a_fresh_folder(self) -> None:
        """What crashed, was retried and was redone has the answers of a run that never was (I5)."""
        kept, self.out = self.out, self.base / "fresh"
        list(self.run())
        fresh = {(row["source"], row["row"]): row for row in rows_of(self.out)}
        shutil.rmtree(self.out)
        self.out = kept
        for place, row in self.said.items():
            # One that failed before its picture came stays failed until it is retried.
            if row["status"] == "ok" or self.picture(row) in self.missing:
                assert row == fresh[place]

    @invariant()
    def every_part_is_whole_and_no_row_stands_twice(self) -> None:
        rows = rows_of(self.out)
        places = [(row["source"], row["row"]) for row in rows]
        assert len(places) == len(set(places))
        assert {(row["source"], row["row"]): row for row in rows} == self.said

    @invariant()
    def every_source_stands_with_rows_of_one_version_only(self) -> None:
        versions = {(row["source"], row["title"].split()[1].split("-")[0]) for row in self.said.values()}
        assert len(versions) == len({source for source, _ in versions})


def test_any_order_of_events_keeps_every_row_once(monkeypatch: pytest.MonkeyPatch, judge: Judge) -> None:
    # Decoders in this process: thousands of runs are made here, and their processes are for F3.
    monkeypatch.setattr(executor, "num_decoders", lambda: 0)
    monkeypatch.setattr(Folder, "happened", Counter())

    run_state_machine_as_test(
        Folder,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=NUM_STEPS,
            deadline=None,
            database=None,
            derandomize=not WANTS_ALL,
            # Looking for the shortest way to a failure takes minutes, which a sample does not have.
            phases=[Phase.generate, *([Phase.shrink] if WANTS_ALL else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )

    what = ", ".join(f"{count} {kind}" for kind, count in sorted(Folder.happened.items()))
    judge(f"F7 state machine ({what})", Folder.happened.total(), [])
