"""What `verify` prints of the sources and their failures."""

from pathlib import Path

from glm4v_batch.verdict_text import verdict_as_text
from glm4v_batch.verify import SourceCount, Verdict


def count(path: str, **failures: int) -> SourceCount:
    num_failed = sum(failures.values())
    return SourceCount(path, 10, 1, 10 - num_failed, num_failed, failures, 0, ())


def failures_told(*counts: SourceCount) -> list[str]:
    verdict = Verdict(Path("out"), "job", "f" * 64, False, 1, counts, (), (), (), None)
    lines = verdict_as_text(verdict).splitlines()
    start = lines.index("failures by code") + 1
    return lines[start : lines.index("", start)]


def test_failures_are_told_by_code_and_where_there_are_several_sources_by_source() -> None:
    one = count("a.parquet", image_corrupt=2, image_missing=1)

    assert failures_told(one) == ["        2  image_corrupt", "        1  image_missing"]
    assert failures_told(one, count("b.parquet", image_corrupt=3), count("c.parquet")) == [
        "        5  image_corrupt: 3 in b.parquet, 2 in a.parquet",
        "        1  image_missing: 1 in a.parquet",
    ]


def test_only_the_sources_with_most_failures_of_a_code_are_named() -> None:
    counts = [count(f"{number}.parquet", image_corrupt=number) for number in range(1, 6)]

    (line,) = failures_told(*counts)

    assert line.endswith("5 in 5.parquet, 4 in 4.parquet, 3 in 3.parquet, and 2 more sources")
