"""F9: decoders that crash, loop, sleep, exit or eat memory cost their record and nothing else."""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from glm4v_batch.checkpoint import read_checkpoint
from glm4v_batch.engines.echo import EchoEngine
from glm4v_batch.prepare import Item, Prepared, Preprocessor, PreprocessSettings
from glm4v_batch.preprocess import LookAhead, preprocess
from glm4v_batch.types import Chunk, Completion, Failure, ImageRef, Record, Result
from tests.conftest import image_bytes
from tests.e2e.command import MODEL

WANTS_ALL = os.environ.get("FAULTS") == "all"
POISONS = {
    "segfault": "decoder_crashed",
    "abort": "decoder_crashed",
    "exit 0": "decoder_crashed",
    "exit 3": "decoder_crashed",
    "kill": "decoder_crashed",
    "loop": "decoder_timeout",
    "sleep": "decoder_timeout",
    "allocate": "out_of_memory",
}
_MOST_STARTS = 3
"""For one guilty record: with its group, and twice alone."""
_MOST_KILLED_STARTS = 6
"""For one that others seem to kill: with its group, and five times alone."""


class Poisoned:
    """Prepares records as a run does, but first does what the title begins with, if that is a poison.

    Each start is counted by a file in the job's image folder, made before the process is confined.
    """

    def __init__(self, settings: PreprocessSettings) -> None:
        assert settings.root is not None
        (settings.root / f"start-{os.getpid()}").touch()
        self._prepare = Preprocessor(settings)

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        name = record.fields["title"].partition(":")[0]
        if name == "look":
            found = _look()
            return Failure(record.record_id, chunk.chunk_id, record.row, "decode", "preprocess_error", found)
        if name in DEEDS:
            DEEDS[name]()
        return self._prepare(chunk, record)


DEEDS: dict[str, Callable[[], object]] = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit 0": lambda: os._exit(0),
    "exit 3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "loop": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),  # for years, in C
    "sleep": lambda: time.sleep(3600),
    "allocate": lambda: bytearray(10 * 1024**3),
    "slow": lambda: time.sleep(0.8),
}


def _look() -> str:
    """What a decoder finds of the secret, having said it aloud as a library would."""
    seen = Path("/proc/self/environ").read_bytes() + repr(dict(os.environ)).encode()
    os.write(2, b"hunter2")
    return "the secret" if b"hunter2" in seen else "nothing"


def items(titles: Sequence[str]) -> Iterator[Item]:
    for row, title in enumerate(titles):
        image = ImageRef(data=image_bytes(row, size=(30, 30)))
        yield (
            Chunk("a.parquet", row - row % 8, 8),
            Record(f"id-{row}", "a.parquet", row, (image,), {"title": title}),
        )


def run(root: Path, titles: Sequence[str], **limits: Any) -> tuple[list[Result], int]:
    """What the echo engine makes of *titles*, and how many decoders were started for them."""
    root.mkdir()
    settings = PreprocessSettings(
        checkpoint=read_checkpoint(MODEL), system=None, user="{title}", max_new_tokens=8, root=root, **limits
    )
    ahead = LookAhead(records_per_group=8)
    requests = preprocess(items(titles), settings, num_workers=2, ahead=ahead, make=Poisoned)
    events = list(EchoEngine(8).run(requests))
    return [e for e in events if isinstance(e, (Completion, Failure))], len(list(root.iterdir()))


def answers(results: Sequence[Result]) -> dict[int, str]:
    return {result.row: result.text for result in results if isinstance(result, Completion)}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poison_costs_itself_alone_after_a_bounded_number_of_starts(
    tmp_path: Path, poison: str, record_property: Callable[[str, object], None]
) -> None:
    num_rows = 96 if WANTS_ALL else 24
    guilty = list(range(5, num_rows, 11))
    titles = [f"{poison}: {row}" if row in guilty else f"title {row}" for row in range(num_rows)]
    # The title of a guilty row is part of its prompt alone.
    undisturbed, _ = run(tmp_path / "undisturbed", [f"title {row}" for row in range(num_rows)])
    limits: dict[str, Any] = {"record_cpu_seconds": 1}
    if poison == "sleep":
        limits["record_seconds"] = 3.0

    most_starts = _MOST_KILLED_STARTS if poison == "kill" else _MOST_STARTS

    results, num_starts = run(tmp_path / "poisoned", titles, **limits)

    expected = {row: text for row, text in answers(undisturbed).items() if row not in guilty}
    failed = {result.row: result.code for result in results if isinstance(result, Failure)}
    violations = [
        *(["each row once"] if sorted(r.row for r in results) != list(range(num_rows)) else []),
        *(["neighbours unchanged"] if answers(results) != expected else []),
        *([f"codes {failed}"] if failed != dict.fromkeys(guilty, POISONS[poison]) else []),
        *([f"{num_starts} starts"] if num_starts > 2 + most_starts * len(guilty) else []),
    ]
    record_property(
        "fault",
        f"F9 {poison}: {len(guilty)} poisons among {num_rows} records tried, {num_starts} decoders started, "
        f"{len(violations)} violations",
    )
    assert violations == []


def test_slow_records_of_one_group_do_not_share_their_patience(tmp_path: Path) -> None:
    titles = [f"slow: {row}" for row in range(8)]

    results, num_starts = run(tmp_path / "slow", titles, record_seconds=5)

    assert [type(result) for result in results] == [Completion] * 8
    assert num_starts <= 2


def test_decoders_know_no_secrets_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")

    results, _ = run(tmp_path / "curious", ["look: around", "look: again"])

    messages = [result.message for result in results if isinstance(result, Failure)]
    assert messages == ["nothing", "nothing"]
    assert "hunter2" not in "".join(capfd.readouterr())
