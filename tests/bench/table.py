"""Figures as a table in Markdown, a dash where nobody measured."""

from collections.abc import Callable, Mapping, Sequence

from tests.bench.measure import Figures

Cell = Callable[[Figures], str]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _start(each: Figures) -> str:
    # What compiles does so before the replica says that it is ready.
    compiling = each.compile_seconds or 0.0
    rest = each.first_part_seconds - each.load_seconds
    return " + ".join(map(_number, (each.load_seconds - compiling, each.compile_seconds, rest)))


COLUMNS: Mapping[str, Cell] = {
    "engine": lambda each: each.engine,
    "work": lambda each: each.work.upper(),
    "cards": lambda each: f"{each.num_devices}" if each.num_devices else "CPU",
    "cap, GiB": lambda each: _number(each.cap_gib, 0),
    "rows": lambda each: f"{each.rows}",
    "failed": lambda each: f"{each.failed}",
    "wrong length": lambda each: f"{each.wrong_length}",
    "images/s": lambda each: _number(each.images_per_second, 2),
    "with loading": lambda each: _number(each.images_per_second_overall, 2),
    "first part, s": lambda each: _number(each.first_part_seconds),
    "load + compile + rest, s": _start,
    "vision, ms": lambda each: _number(each.vision_ms),
    "prefill, ms": lambda each: _number(each.prefill_ms),
    "decode, ms": lambda each: _number(each.decode_ms),
    "TFLOP an image": lambda each: _number(each.tflop_per_image, 3),
    "of the limit": lambda each: _percent(each.limit_fraction),
    "idle": lambda each: _percent(each.idle_fraction),
    "idle by NVML": lambda each: _percent(each.idle_fraction_nvml),
    "allocated, GiB": lambda each: _number(each.peak_allocated_gib, 2),
    "reserved, GiB": lambda each: _number(each.peak_reserved_gib, 2),
    "OOM": lambda each: f"{each.out_of_memory}",
}


def table(lines: Sequence[Figures]) -> str:
    """A heading and a row for each of *lines*."""
    cells = [list(COLUMNS), *([cell(each) for cell in COLUMNS.values()] for each in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    )
