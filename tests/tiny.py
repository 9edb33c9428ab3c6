"""The bundled tiny GLM-4V through the product's own code, in this process."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from glm4v_batch.activations import prior_coefficients
from glm4v_batch.engines.generate import GenerateEngine, Vocabulary, vocabulary_of
from glm4v_batch.job import Job, read_job
from glm4v_batch.memory import MemoryModel, Meter
from glm4v_batch.model import load_model
from glm4v_batch.plan import open_job, preprocess_settings
from glm4v_batch.preprocess import preprocess
from glm4v_batch.types import BatchRun, Chunk, Completion, Failure, Record, Request
from tests.cpu_meter import EndlessMeter

ROOT = Path(__file__).parents[1]
ENDLESS = 1 << 40


def job_of(name: str, *overrides: str) -> Job:
    """The job file `jobs/<name>.yaml`."""
    return read_job(ROOT / "jobs" / f"{name}.yaml", overrides)


@cache
def weights() -> Any:
    """The tiny model in float32, loaded once for all tests."""
    return load_model(ROOT / "data" / "tiny-glm4v", "float32", {"": "cpu"})


@cache
def sample(name: str) -> tuple[list[Record], list[Request]]:
    """Records and requests of all sample rows of a job."""
    opened = open_job(job_of(name))
    source = opened.source
    pairs: list[tuple[Chunk, Record]] = [
        (chunk, record)
        for shard in opened.shards
        for chunk in source.chunks(shard, [range(shard.num_rows or 0)], 128)
        for record in source.read(chunk)
    ]
    results = list(preprocess(iter(pairs), preprocess_settings(opened), num_workers=0))
    requests = [result for result in results if isinstance(result, Request)]
    assert len(requests) == len(results)
    return [record for _, record in pairs], requests


@cache
def vocabulary(name: str, *overrides: str) -> Vocabulary:
    """What the engines know of tokens in a job. Once: opening a source starts a process."""
    opened = open_job(job_of(name, *overrides))
    return vocabulary_of(opened.checkpoint, preprocess_settings(opened).renderer().decode)


def weight_bytes() -> int:
    """Bytes of the tiny model's weights in float32."""
    return sum(p.numel() * p.element_size() for p in weights().parameters())


def engine(
    name: str,
    *overrides: str,
    meter: Meter | None = None,
    memory: MemoryModel | None = None,
    memory_fraction: float = 1.0,
    max_batch_size: int | None = None,
) -> GenerateEngine:
    """The generate engine on the tiny model; without *meter* memory is endless."""
    meter = meter or EndlessMeter(weight_bytes())
    return GenerateEngine(
        weights(),
        vocabulary(name, *overrides),
        job_of(name, *overrides).generation,
        memory or MemoryModel(meter.held_bytes(), [prior_coefficients(weights().config.to_dict(), 4)]),
        meter,
        memory_fraction=memory_fraction,
        max_batch_size=max_batch_size,
    )


def texts(events: Iterable[object]) -> dict[int, str]:
    """The text of each completion by its place among the requests; a failure is an error here."""
    found: dict[int, str] = {}
    for event in events:
        assert not isinstance(event, Failure), event
        if isinstance(event, Completion):
            key = int(event.record_id.rsplit("-", 1)[-1])
            assert key not in found
            found[key] = event.text
    return found


def runs(events: Iterable[object]) -> list[BatchRun]:
    """The batches among *events*."""
    return [event for event in events if isinstance(event, BatchRun)]


def answers(
    name: str, requests: Sequence[Request], overrides: Sequence[str] = (), **options: Any
) -> Iterator[object]:
    """Run *requests* through a fresh engine."""
    yield from engine(name, *overrides, **options).run(requests)
