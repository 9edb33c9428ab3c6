"""Which engine runs, and what is said where it is not the packed one."""

from dataclasses import replace

import pytest

from glm4v_batch.engine_choice import reason_for_generate
from glm4v_batch.errors import JobError
from glm4v_batch.job import Job
from glm4v_batch.types import Replica
from tests.cards import glm_41v, gpu
from tests.tiny import job_of


def job(engine: str) -> Job:
    return job_of("caption", f"batching.engine={engine}")


def on_cards(num_cards: int = 1, offloaded_bytes: int = 0) -> Replica:
    cards = tuple(gpu(index, 24) for index in range(num_cards))
    return Replica(cards, {"": 0}, (1,) * num_cards, offloaded_bytes)


def test_what_the_job_says_runs() -> None:
    assert reason_for_generate(job("packed"), glm_41v(), on_cards()) is None
    assert reason_for_generate(job("generate"), glm_41v(), on_cards()) == "as the job says"


def test_packed_is_refused_where_it_cannot_serve() -> None:
    unknown = replace(glm_41v(), config={**glm_41v().config, "model_type": "llava"})

    with pytest.raises(JobError, match="does not know models of the type llava"):
        reason_for_generate(job("packed"), unknown, on_cards())
    with pytest.raises(JobError, match="host memory or on the disk"):
        reason_for_generate(job("packed"), glm_41v(), on_cards(offloaded_bytes=1))


def test_auto_is_the_packed_engine_on_one_gpu_and_on_several() -> None:
    assert reason_for_generate(job("auto"), glm_41v(), on_cards()) is None
    assert reason_for_generate(job("auto"), glm_41v(), on_cards(num_cards=2)) is None


def test_auto_says_why_it_takes_generate() -> None:
    unknown = replace(glm_41v(), config={**glm_41v().config, "model_type": "llava"})

    reasons = [
        reason_for_generate(job("auto"), needs, where)
        for needs, where in (
            (unknown, on_cards()),
            (replace(glm_41v(), bytes_per_value=4), on_cards()),
            (replace(glm_41v(), config={**glm_41v().config, "quantization_config": {}}), on_cards()),
            (replace(glm_41v(), config={**glm_41v().config, "model_type": "glm4v_moe"}), on_cards()),
        )
    ]

    words = ["llava", "16 bits", "quantised", "mixtures of experts"]
    assert [word in str(reason) for word, reason in zip(words, reasons, strict=True)] == [True] * 4
