"""The bundled GLM-4V through the product: right answers, and the same ones whatever the batch."""

import json
import shutil
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from glm4v_batch.activations import prior_coefficients
from glm4v_batch.engines.generate import GenerateEngine
from glm4v_batch.engines.loading import load_engine
from glm4v_batch.executor import replica_settings
from glm4v_batch.memory import MemoryModel
from glm4v_batch.plan import make_plan, open_job
from glm4v_batch.types import Completion, Request
from tests.e2e.command import MODEL, ROOT, run_command
from tests.tiny import answers, job_of, runs, sample, texts, weights

EXPECTED = {"caption": "caption", "question": "answer"}
LEAST_EXACT = {"caption": 0.97, "question": 0.95}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both sample jobs, run by the command; their output folders."""
    folders = {}
    for name in EXPECTED:
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        done = run_command("run", f"jobs/{name}.yaml", "--set", f"output.path={folders[name]}", timeout=1200)
        assert done.returncode == 0, done.stderr
    return folders


@cache
def one_by_one(name: str) -> dict[int, str]:
    """The text of every sample record, each run alone."""
    return texts(answers(name, sample(name)[1], max_batch_size=1))


def test_no_model_is_trained_in_the_product() -> None:
    assert "tiny" not in "".join(p.read_text() for p in (ROOT / "pipeline").rglob("*.py"))


@pytest.mark.parametrize("name", EXPECTED)
def test_held_out_records_are_answered_right(finished: dict[str, Path], name: str) -> None:
    rows = pq.read_table(finished[name]).to_pylist()

    right = sum(row["text"] == row[EXPECTED[name]] for row in rows)

    assert len(rows) >= 512
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert right / len(rows) >= LEAST_EXACT[name], f"{right} of {len(rows)}"


@pytest.mark.parametrize("name", EXPECTED)
def test_every_text_is_the_same_as_with_batch_size_1(finished: dict[str, Path], name: str) -> None:
    rows = pq.read_table(finished[name]).to_pylist()
    in_batches = {int(row["id"].rsplit("-", 1)[-1]): row["text"] for row in rows}

    assert in_batches == one_by_one(name)


def scattered(requests: list[Request]) -> list[Request]:
    """Short and long prompts by turns, so that fixed-size batches pad much."""
    by_length = sorted(requests, key=lambda r: r.prompt_tokens)
    return [r for pair in zip(by_length, reversed(by_length), strict=True) for r in pair][: len(requests)]


@pytest.mark.parametrize("size", [2, 7, 33])
def test_heavily_padded_batches_change_no_text(size: int) -> None:
    requests = scattered(sample("question")[1][:99])

    events = list(answers("question", requests, max_batch_size=size))

    alone = one_by_one("question")
    assert max(run.shape.batch_size for run in runs(events)) == size
    assert texts(events) == {int(r.record_id.rsplit("-", 1)[-1]): alone[_number(r)] for r in requests}


def _number(request: Request) -> int:
    return int(request.record_id.rsplit("-", 1)[-1])


SAMPLED = ("generation.temperature=8", "generation.top_k=50", "generation.repetition_penalty=1.2")


def test_sampled_texts_depend_on_the_seed_and_not_on_the_batch() -> None:
    requests = sample("caption")[1][:24]

    alone = texts(answers("caption", requests, SAMPLED, max_batch_size=1))
    together = texts(answers("caption", requests, SAMPLED))
    reseeded = texts(answers("caption", requests, (*SAMPLED, "generation.seed=1")))
    greedy = texts(answers("caption", requests))

    assert together == alone
    assert sum(reseeded[n] != alone[n] for n in alone) > len(alone) / 2
    assert sum(greedy[n] != alone[n] for n in alone) > len(alone) / 2


def test_an_answer_cut_by_max_new_tokens_says_so() -> None:
    requests = sample("caption")[1][:8]

    events = list(answers("caption", requests, ("generation.max_new_tokens=3",)))

    cut = [event for event in events if isinstance(event, Completion)]
    whole = one_by_one("caption")
    assert {(c.finish_reason, c.completion_tokens) for c in cut} == {("length", 3)}
    assert all(whole[c.row].startswith(c.text) and whole[c.row] != c.text for c in cut)


def test_the_jobs_memory_settings_reach_the_engine(finished: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished["question"], folder)
    next(folder.glob("part-*")).unlink()
    changes = (f"output.path={folder}", "devices.memory_fraction=0.5", "batching.max_batch_size=9")
    (settings,) = replica_settings(make_plan(open_job(job_of("question", *changes))))

    engine = load_engine(settings)

    assert isinstance(engine, GenerateEngine)
    assert engine._room._memory_fraction == 0.5
    assert engine._scheduler._max_batch_size == 9
    # Its memory model has learnt from the batches that the folder remembers.
    assert engine._memory.trust > MemoryModel([1], [prior_coefficients(weights().config.to_dict(), 4)]).trust


def test_a_checkpoint_with_missing_or_unknown_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for path in MODEL.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(MODEL / "model.safetensors")
    # transformers would fill the missing one with random numbers and go on.
    weights["model.language_model.layers.0.mlp.extra.weight"] = weights.pop(
        "model.language_model.norm.weight"
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    refused = run_command(
        "run", "jobs/caption.yaml", "--set", f"model.name={folder}", "--set", f"output.path={tmp_path}/out"
    )

    assert refused.returncode == 2
    assert "does not match its config.json" in refused.stderr
    assert (
        "1 weights that the model needs are missing, such as model.language_model.norm.weight"
        in refused.stderr
    )
    assert "1 weights that the model does not have, such as" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_reports_its_batches_and_resumes_warm(finished: dict[str, Path]) -> None:
    folder = finished["question"]

    found = json.loads(run_command("status", folder, "--json").stdout)
    lines = (folder / ".glm4v-batch" / "batches.jsonl").read_text().splitlines()

    assert found["num_ok"] >= 512
    assert found["batches"]["num"] == len(lines) > 0
    assert found["batches"]["peak_bytes"] > 0
    assert all(json.loads(line)["predicted_bytes"] for line in lines)
