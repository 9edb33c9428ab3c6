"""Measure the engines on W1 and W2 through the command line, from Parquet with JPEGs to committed parts."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from tests.bench.inputs import ModelSize, checkpoint, source
from tests.bench.measure import Figures, MeasurementError, Setup, measure
from tests.bench.table import table

DEFAULT_ROWS = {"w1": 512, "w2": 600}
CAP_GIB = 24.0
TABLE = (
    ("w1", "packed", None),
    ("w2", "packed", None),
    ("w2", "generate", None),
    ("w1", "packed", CAP_GIB),
    ("w2", "packed", CAP_GIB),
)
"""Work, engine and cap of each line."""


@click.command()
@click.argument("work_folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--work", type=click.Choice(["w1", "w2"]), help="One line instead of the whole table.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each line. Default: 512 of W1, 600 of W2.")
@click.option("--engine", type=click.Choice(["packed", "generate"]), help="With --work. Default: packed.")
@click.option("--cap-gib", type=click.FloatRange(min=0, min_open=True), help="With --work. Default: none.")
@click.option("--model", type=click.Choice(["full", "tiny"]), default="full", show_default=True,
              help="full: GLM-4.1V-9B's dimensions, on GPUs. tiny: the bundled one, on the CPU.")  # fmt: skip
@click.option("--devices", type=click.IntRange(min=1), help="So many GPUs, from the first on. Default: 1.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The figures as JSON.")
@click.option("--commit", help="What was measured. Default: what git says.")
def main(
    work_folder: Path, work: str | None, rows: int | None, engine: str | None, cap_gib: float | None,
    model: ModelSize, devices: int | None, out: Path | None, commit: str | None,
) -> None:  # fmt: skip
    """Measure in WORK_FOLDER, which keeps model (20 GB), pictures, outputs and logs for the next time.

    Example: python -m tests.bench build/bench --work w1 --cap-gib 24
    """
    if work is None and (engine or cap_gib):
        raise click.UsageError("--engine and --cap-gib are for one line: give --work too.")
    if model == "tiny" and (devices or cap_gib):
        raise click.UsageError("--devices and --cap-gib have no effect on the CPU, where --model tiny runs.")
    num_devices = 0 if model == "tiny" else devices or 1
    asked = [(work, engine or "packed", cap_gib)] if work else _lines(model)
    setups = [Setup(name, rows or DEFAULT_ROWS[name], kind, cap, num_devices) for name, kind, cap in asked]
    sys.exit(_measure_all(setups, work_folder.absolute(), model, out, environment(commit)))


def _lines(model: ModelSize) -> list[tuple[str, str, float | None]]:
    return [line for line in TABLE if model == "full" or line[2] is None]


def _measure_all(
    setups: Sequence[Setup], folder: Path, model: ModelSize, out: Path | None, about: dict[str, Any]
) -> int:
    """Print the table after each line, because a machine may be taken away; 1 where a line failed."""
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Figures] = []
    errors: list[str] = []
    weights = checkpoint(folder, model)
    for setup in setups:
        try:
            pictures = source(folder, setup.work, setup.num_rows)
            lines.append(measure(setup, weights, pictures, folder / "runs"))
            print(table(lines), flush=True)
        except MeasurementError as error:
            errors.append(str(error))
            print(f"{setup.name}: {error}", flush=True)
        if out is not None:
            body = {"about": about, "lines": [asdict(line) for line in lines], "errors": errors}
            out.write_text(json.dumps(body, indent=2) + "\n")
    return int(bool(errors) or any(line.failed or line.wrong_length for line in lines))


def environment(commit: str | None) -> dict[str, Any]:
    """Hardware, versions and commit, for the record; nothing here makes a CUDA context."""
    packages = ("torch", "transformers", "accelerate")
    return {
        "hardware": _hardware(),
        "Python": sys.version.split()[0],
        **{package: version(package) for package in packages},
        "commit": commit or _said("git", "rev-parse", "--short", "HEAD") or "unknown",
    }


def _hardware() -> str:
    cards = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return f"{len(cards)} × {cards[0]}" if cards else "no GPU"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    main()
