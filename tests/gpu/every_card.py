"""What "every card busy, none out of memory" shows on GPUs: one scenario, one line.

Run from the repository's root, with the model and source that tests/gpu/full_size.py makes:

    PYTHONPATH=pipeline:. python -m tests.gpu.every_card one-card --model M --source S --out OUT

Cards are capped by `devices.memory_limit_gib`, to stand for smaller ones. Everything runs through the
command line, on the `generate` engine unless --engine says packed; figures come from the folder that it
leaves. The packed engine's lines count seconds, not batches.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from glm4v_batch.report import batch_figures, read_runs
from glm4v_batch.types import BatchRun

GIB = 1 << 30
_WARM_UP_BATCHES = 20
_SAMPLE_SECONDS = 0.25
_CONTEXT_BYTES = 520 << 20


def write_job(
    path: Path, model: Path, source: Path, out: Path, new_tokens: int, devices: str, engine: str = "generate"
) -> Path:
    """A job over *source* whose answers are cut after *new_tokens*; *devices* is its section in YAML."""
    path.write_text(
        f"name: {path.stem}\n"
        f'source: {{kind: parquet, path: "{source}/*.parquet", id: id}}\n'
        'prompt: {user: "{question}"}\n'
        f"model: {{name: {model}}}\n"
        f"generation: {{max_new_tokens: {new_tokens}}}\n"
        f"devices: {devices}\n"
        f"batching: {{engine: {engine}}}\n"
        f"output: {{path: {out}, rows_per_part: 32}}\n"
    )
    return path


def command(*arguments: object) -> list[str]:
    """The command line that runs glm4v-batch."""
    return [sys.executable, "-m", "glm4v_batch.cli", *map(str, arguments)]


def run(job: Path, *arguments: str) -> tuple[int, float]:
    """Run *job*, its progress going to a file beside it; the exit code and the seconds."""
    started = time.perf_counter()
    with job.with_suffix(".log").open("w") as log:
        finished = subprocess.run(command("run", job, *arguments), stdout=log, stderr=log, check=False)
    return finished.returncode, time.perf_counter() - started


def folder_figures(out: Path) -> dict[str, Any]:
    """What the run left: rows, failures, and the figures of its batches, before and after warming up."""
    report = out / ".glm4v-batch" / "report.json"
    if not report.is_file():
        raise SystemExit(f"{out.name} left no report:\n{out.with_suffix('.log').read_text()[-3000:]}")
    runs = [run for _, run in read_runs(out)]
    tables = [pq.read_table(path, columns=["id", "status"]) for path in sorted(out.glob("part-*.parquet"))]
    ids = [cell for table in tables for cell in table["id"].to_pylist()]
    statuses = [cell for table in tables for cell in table["status"].to_pylist()]
    assert len(ids) == len(set(ids)), "a record stands twice"
    late = runs[_WARM_UP_BATCHES:]
    return {
        "rows": len(ids),
        "failed": statuses.count("failed"),
        **batch_figures(runs),
        "late_out_of_memory": sum(run.out_of_memory for run in late),
        "reports": json.loads(report.read_text()),
        "runs": runs,
    }


def show(name: str, **figures: object) -> None:
    """One line for one scenario."""
    shown = "  ".join(f"{key} {value}" for key, value in figures.items())
    print(f"{name}: {shown}", flush=True)


def common(figures: dict[str, Any], code: int, seconds: float) -> dict[str, object]:
    """The figures that every scenario shows."""
    ready = figures["reports"]["replicas"]["load_seconds"]
    return {
        "exit": code,
        "rows": figures["rows"],
        "failed": figures["failed"],
        "batches": figures["num"],
        "largest": figures["largest"],
        "oom": figures["out_of_memory"],
        f"oom_after_{_WARM_UP_BATCHES}": figures["late_out_of_memory"],
        "budget_median": f"{figures.get('budget_used_median', 0):.1%}",
        "error_p95": f"{figures.get('prediction_error_p95', 0):.1%}",
        "reserved_beyond_peak_p95": f"{figures.get('reserved_beyond_peak_p95', 0):.1%}",
        "load_s": ready,
        "total_s": round(seconds, 1),
        "rows/s_after_loading": round(steady_rate(figures["runs"]), 2),
        "plan": figures["reports"]["plan"],
    }


def steady_rate(runs: Sequence[BatchRun]) -> float:
    """Answers per second of batch time, added up over the replicas, each by its own batches."""
    rate = 0.0
    for replica in {run.replica for run in runs}:
        own = [run for run in runs if run.replica == replica]
        answered = sum(run.shape.batch_size for run in own if not run.out_of_memory)
        rate += answered / sum(run.seconds for run in own)
    return rate


def one_card(options: argparse.Namespace) -> None:
    """Mixed sizes on one card capped at 24 GiB."""
    job = write_job(
        options.out / "one_card.yaml", options.model, options.source, options.out / "one_card", 32,
        f"{{use: [{options.card}], memory_limit_gib: 24}}",
    )  # fmt: skip
    code, seconds = run(job, "--limit", str(options.rows))
    show("one card of 24 GiB", **common(folder_figures(options.out / "one_card"), code, seconds))


_TAKE = """
import sys, time, torch
card, num_blocks, num_bytes = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
blocks = []
while len(blocks) < num_blocks:
    try:
        blocks.append(torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{card}"))
    except torch.OutOfMemoryError:
        time.sleep(0.02)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def taken(card: int, num_bytes: int, block_bytes: int = 64 << 20) -> Iterator[threading.Event]:
    """Another process that takes *num_bytes* of *card*, block by block, as soon as they are free.

    The event is set once it has them; it holds them to the end.
    """
    arguments = [str(card), str(num_bytes // block_bytes), str(block_bytes)]
    has_all = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-c", _TAKE, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        threading.Thread(target=_set_when_held, args=(process.stdout, has_all), daemon=True).start()
        yield has_all
        process.kill()


def _set_when_held(stream: Any, has_all: threading.Event) -> None:
    if stream.readline() == "held\n":
        has_all.set()


def neighbour(options: argparse.Namespace) -> None:
    """The same on a card that really has 24 GiB, of which another process takes 2 in mid-run.

    Both processes' CUDA contexts count: ours beside the 24 GiB, the neighbour's as a part of its 2.
    """
    import torch

    card, out = options.card, options.out / "neighbour"
    free, _ = torch.cuda.mem_get_info(card)
    job = write_job(
        options.out / "neighbour.yaml", options.model, options.source, out, 32, f"{{use: [{card}]}}"
    )
    outcome: list[tuple[int, float]] = []
    with taken(card, free - 24 * GIB - 2 * _CONTEXT_BYTES) as is_small:
        assert is_small.wait(60)
        worker = threading.Thread(target=lambda: outcome.append(run(job, "--limit", str(options.rows))))
        worker.start()
        while sum(1 for _ in read_runs(out)) < options.batches_before and worker.is_alive():
            time.sleep(_SAMPLE_SECONDS)
        num_before = sum(1 for _ in read_runs(out))
        with taken(card, 2 * GIB - _CONTEXT_BYTES) as has_all:
            worker.join()
            got_all = has_all.is_set()
    figures = folder_figures(out)
    after = [each.shape.batch_size for each in figures["runs"][num_before:] if not each.out_of_memory]
    show(
        "a neighbour takes 2 GiB",
        **common(figures, *outcome[0]),
        came_after_batches=num_before,
        got_2_gib=got_all,
        largest_after=max(after, default=0),
        budget_before=round(figures["runs"][0].budget_bytes[0] / GIB, 2),
        budget_after=round(figures["runs"][-1].budget_bytes[0] / GIB, 2),
    )


def four_replicas(options: argparse.Namespace) -> None:
    """One replica on one card, then all cards: capped at 24 GiB, the same rows per replica."""
    rates: dict[int, tuple[float, float]] = {}
    for cards in ([0], list(range(options.cards))):
        name = f"replicas_{len(cards)}"
        job = write_job(
            options.out / f"{name}.yaml", options.model, options.source, options.out / name, 32,
            f"{{use: {cards}, memory_limit_gib: 24}}",
        )  # fmt: skip
        rows = options.rows * len(cards)
        with watched_memory() as memory:
            code, seconds = run(job, "--limit", str(rows))
        figures = folder_figures(options.out / name)
        loading = figures["reports"]["replicas"]["load_seconds"]
        rates[len(cards)] = (rows / (seconds - loading), steady_rate(figures["runs"]))
        show(
            f"{len(cards)} cards of 24 GiB, auto",
            replicas=figures["reports"]["replicas"]["num"],
            **common(figures, code, seconds),
            most_private_host_gib=round(memory["private_bytes"] / GIB, 2),
        )
    (one, one_steady), (all_, all_steady) = rates[1], rates[options.cards]
    show(
        "replicas together", ratio=f"{all_ / one:.2f}", ratio_of_batch_rates=f"{all_steady / one_steady:.2f}"
    )


@contextmanager
def watched_memory() -> Iterator[dict[str, int]]:
    """The most private (not file-backed) memory that all processes of ours held together."""
    most = {"private_bytes": 0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            total = sum(_private_bytes(folder) for folder in Path("/proc").glob("[0-9]*"))
            most["private_bytes"] = max(most["private_bytes"], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _private_bytes(folder: Path) -> int:
    try:
        if not (folder / "comm").read_text().startswith(("python", "glm4v")):
            return 0
        lines = (folder / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def plain_auto(options: argparse.Namespace) -> None:
    """transformers' own `device_map="auto"` over the cards, with the largest fixed batch that survives."""
    import torch
    from transformers import AutoModelForImageTextToText

    from tests.gpu.batch_size_search import requests
    from tests.gpu.plain import generate_batch

    for card in range(options.cards):
        total = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / total, card)
    model = AutoModelForImageTextToText.from_pretrained(
        options.model, dtype=torch.bfloat16, device_map="auto",
        max_memory=dict.fromkeys(range(options.cards), f"{options.cap_gib}GiB"),
    )  # fmt: skip
    work = list(requests(model, options.rows, 32))
    for size in options.sizes:
        seconds = generate_batch(model, work, size)
        peaks = [round(torch.cuda.max_memory_allocated(card) / GIB, 1) for card in range(options.cards)]
        rate = "out of memory" if seconds is None else f"{len(work) / seconds:.2f} rows/s"
        show(f"plain device_map=auto, {options.cards} cards of {options.cap_gib} GiB, batch {size}",
             result=rate, peaks_gib=peaks)  # fmt: skip
        if seconds is not None:
            return


def balanced(options: argparse.Namespace) -> None:
    """One replica over all cards, too small for one each, as the planner lays it."""
    out = options.out / f"balanced_{options.engine}"
    job = write_job(
        out.with_suffix(".yaml"), options.model, options.source, out, 32,
        f"{{use: {list(range(options.cards))}, layout: balanced, memory_limit_gib: {options.cap_gib}}}",
        options.engine,
    )  # fmt: skip
    code, seconds = run(job, "--limit", str(options.rows))
    figures = folder_figures(out)
    loading = figures["reports"]["replicas"]["load_seconds"]
    clean = [each for each in figures["runs"] if not each.out_of_memory]
    peaks = [max(each.peak_bytes[card] for each in clean) / GIB for card in range(options.cards)]
    spreads = sorted(1 - min(each.peak_bytes) / max(each.peak_bytes) for each in clean[len(clean) // 2 :])
    show(
        f"balanced over {options.cards} cards of {options.cap_gib} GiB, {options.engine}",
        **common(figures, code, seconds),
        rows_per_second_from_loading=round(figures["rows"] / (seconds - loading), 2),
        peaks_gib=[round(peak, 2) for peak in peaks],
        peaks_within=f"{1 - min(peaks) / max(peaks):.1%}",
        median_within=f"{spreads[len(spreads) // 2]:.1%}",
    )


def offload(options: argparse.Namespace) -> None:
    """What does not fit goes to host memory, or stays on the disk, when asked for."""
    for place in ("cpu", "disk"):
        out = options.out / f"offload_{place}"
        job = write_job(
            options.out / f"offload_{place}.yaml", options.model, options.source, out, 4,
            f"{{use: [{options.card}], memory_limit_gib: 14, offload: {place}}}",
        )  # fmt: skip
        code, seconds = run(job, "--limit", "8")
        show(f"14 GiB, offload: {place}", **common(folder_figures(out), code, seconds))


def killed(options: argparse.Namespace) -> None:
    """A replica killed in mid-run, by kill -9: it is started again, and every record stands once."""
    out = options.out / "killed"
    job = write_job(
        options.out / "killed.yaml", options.model, options.source, out, 32,
        f"{{use: {list(range(options.cards))}, memory_limit_gib: 24}}",
    )  # fmt: skip
    outcome: list[tuple[int, float]] = []
    worker = threading.Thread(target=lambda: outcome.append(run(job, "--limit", str(options.rows))))
    worker.start()
    while sum(1 for _ in read_runs(out)) < options.batches_before and worker.is_alive():
        time.sleep(_SAMPLE_SECONDS)
    subprocess.run(["pkill", "-9", "-o", "glm4v-replica"], check=True)
    worker.join()
    figures = folder_figures(out)
    losses = [(loss["reason"], loss["num_requests"]) for loss in figures["reports"]["replicas"]["lost"]]
    show("a replica killed", **common(figures, *outcome[0]), losses=losses)


SCENARIOS = {
    "killed": killed,
    "one-card": one_card,
    "neighbour": neighbour,
    "four-replicas": four_replicas,
    "plain-auto": plain_auto,
    "balanced": balanced,
    "offload": offload,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--card", type=int, default=0)
    parser.add_argument("--cards", type=int, default=4)
    parser.add_argument("--cap-gib", type=int, default=24)
    parser.add_argument(
        "--engine", choices=["generate", "packed", "auto"], default="generate", help="Of balanced."
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 48, 32, 16])
    parser.add_argument("--batches-before", type=int, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    SCENARIOS[options.scenario](options)


if __name__ == "__main__":
    main()
