"""Order kept, neighbours untouched, nothing left behind, whatever happens inside a worker."""

import ctypes
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm4v_batch.checkpoint import read_checkpoint
from glm4v_batch.errors import JobError, PlacementError, sanitise
from glm4v_batch.images import ImageLimits
from glm4v_batch.prepare import Item, Prepared, Preprocessor, PreprocessSettings
from glm4v_batch.preprocess import LookAhead, _item_bytes, preprocess
from glm4v_batch.types import Chunk, Failure, ImageRef, Record, Request

TINY = Path(__file__).parents[2] / "data" / "tiny-glm4v"
SETTINGS = PreprocessSettings(
    checkpoint=read_checkpoint(TINY),
    system=None,
    user="Describe {title}",
    max_new_tokens=8,
    record_seconds=60,
)
SINGLY = LookAhead(records_per_group=1)


def picture(shade: int = 0, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def items(titles: list[str], rows_per_chunk: int = 4) -> Iterator[Item]:
    for row, title in enumerate(titles):
        chunk = Chunk("data/a.parquet", row - row % rows_per_chunk, rows_per_chunk)
        images = (ImageRef(data=picture(row % 256)),)
        yield chunk, Record(f"id{row}", "data/a.parquet", row, images, {"title": title})


def said(chunk: Chunk, record: Record, message: str) -> Failure:
    return Failure(record.record_id, chunk.chunk_id, record.row, "decode", "preprocess_error", message)


class Poisoned:
    """A preprocessor whose decoder does what the record's title says."""

    def __init__(self, settings: PreprocessSettings) -> None:
        self._prepare = Preprocessor(settings)

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        match record.fields["title"]:
            case "segfault":
                ctypes.string_at(0)
            case "abort":
                os.abort()
            case "exit":
                os._exit(0)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "allocate":
                bytearray(10 * 1024**3)
            case "imports":
                loaded = sorted({"torch", "transformers"} & set(sys.modules))
                return said(chunk, record, str(loaded))
            case "passed":
                return said(chunk, record, str(record.passed))
        return self._prepare(chunk, record)


def code_of(result: Prepared) -> str:
    return "ok" if isinstance(result, Request) else result.code


def assert_same(ours: list[Prepared], expected: list[Prepared]) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert isinstance(one, Request)
        assert isinstance(other, Request)
        assert repr(one) == repr(other)  # everything but the inputs
        assert one.inputs.input_ids.tolist() == other.inputs.input_ids.tolist()
        assert one.inputs.image_grid_thw == other.inputs.image_grid_thw
        assert (one.inputs.patches == other.inputs.patches).all()


def child_processes() -> set[int]:
    """The workers: children of our fork server."""
    rows = {int(path.parent.name): state_and_parent(path) for path in Path("/proc").glob("[0-9]*/stat")}
    servers = {pid for pid, (_, parent) in rows.items() if parent == os.getpid()}
    return {pid for pid, (state, parent) in rows.items() if parent in servers and state != "Z"}


def others_end(before: set[int]) -> bool:
    """Whether no worker is left but those of *before*. One that is killed takes a moment to be gone."""
    deadline = time.monotonic() + 10
    while not (is_so := child_processes() <= before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so


def state_and_parent(path: Path) -> tuple[str, int]:
    try:
        state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return state, int(parent)


def test_request_says_what_the_model_will_see() -> None:
    [result] = preprocess(items(["x"]), SETTINGS, num_workers=0)

    assert isinstance(result, Request)
    assert (result.record_id, result.chunk_id, result.row) == ("id0", "data/a.parquet#0+4", 0)
    assert result.inputs.image_grid_thw == ((1, 6, 6),)
    assert result.visual_patches == 36 == len(result.inputs.patches)
    assert result.prompt_tokens == len(result.inputs.input_ids)
    assert result.inputs.input_ids.dtype == np.int32
    assert result.inputs.input_ids.tolist().count(SETTINGS.checkpoint.image_token_id) == 9
    assert result.max_new_tokens == 8


@pytest.mark.parametrize(("own", "expected"), [(3, 3), (8, 8), (9, 8), (None, 8)])
def test_a_row_may_cut_its_answer_earlier_than_the_job_does(own: int | None, expected: int) -> None:
    settings = replace(SETTINGS, max_new_tokens_column="length")
    [(chunk, record)] = items(["x"])
    asked = replace(record, fields={**record.fields, "length": own})

    [result] = preprocess([(chunk, asked)], settings, num_workers=0)

    assert isinstance(result, Request)
    assert result.max_new_tokens == expected


@pytest.mark.parametrize("own", [0, -1])
def test_a_row_that_leaves_no_room_for_an_answer_fails_alone(own: int) -> None:
    settings = replace(SETTINGS, max_new_tokens_column="length")
    two = [
        (chunk, replace(record, fields={**record.fields, "length": length}))
        for (chunk, record), length in zip(items(["x", "y"]), [own, 5], strict=True)
    ]

    bad, good = preprocess(two, settings, num_workers=0)

    assert isinstance(bad, Failure)
    assert (bad.stage, bad.code) == ("render", "no_new_tokens")
    assert bad.message == f"column length allows {own} new tokens"
    assert isinstance(good, Request)


def test_record_with_several_images_has_their_patches_in_order() -> None:
    refs = (ImageRef(data=picture(1)), ImageRef(data=picture(2, (150, 40))))
    record = Record("a", "s", 0, refs, {"title": ""})

    [result] = preprocess([(Chunk("s", 0, 1), record)], SETTINGS, num_workers=0)

    assert isinstance(result, Request)
    assert result.inputs.image_grid_thw == ((1, 6, 6), (1, 4, 12))
    assert [int(patch[0]) for patch in result.inputs.patches] == [1] * 36 + [2] * 48


def test_record_without_images_is_text_only() -> None:
    record = Record("a", "s", 0, (), {"title": ""})

    [result] = preprocess([(Chunk("s", 0, 1), record)], SETTINGS, num_workers=0)

    assert isinstance(result, Request)
    assert result.inputs.patches.shape == (0, 588)
    assert result.inputs.image_grid_thw == ()


def test_workers_give_what_one_process_gives_in_order() -> None:
    titles = [f"title {number}" for number in range(100)]
    before = child_processes()

    ours = list(preprocess(items(titles), SETTINGS, num_workers=2, ahead=LookAhead(records_per_group=7)))

    assert_same(ours, list(preprocess(items(titles), SETTINGS, num_workers=0)))
    assert others_end(before)


@pytest.mark.parametrize(
    ("poison", "code"),
    [
        ("segfault", "decoder_crashed"),
        ("abort", "decoder_crashed"),
        ("exit", "decoder_crashed"),
        ("killed", "decoder_crashed"),
        ("hang", "decoder_timeout"),
        ("allocate", "out_of_memory"),
    ],
)
def test_poison_record_costs_itself_alone(poison: str, code: str) -> None:
    titles = ["a", "b", poison, "c", *"defgh"]
    settings = replace(SETTINGS, record_seconds=1.5) if poison == "hang" else SETTINGS

    results = list(
        preprocess(
            items(titles), settings, num_workers=1, ahead=LookAhead(records_per_group=4), make=Poisoned
        )
    )

    assert [code_of(result) for result in results] == ["ok", "ok", code, *["ok"] * 6]
    assert [result.row for result in results] == list(range(9))


def test_many_poison_records_leave_the_others_in_order() -> None:
    titles = ["exit" if row % 5 == 0 else "fine" for row in range(20)]

    results = list(preprocess(items(titles), SETTINGS, num_workers=2, make=Poisoned))

    expected = ["decoder_crashed" if row % 5 == 0 else "ok" for row in range(20)]
    assert [code_of(result) for result in results] == expected
    assert [result.record_id for result in results] == [f"id{row}" for row in range(20)]


def test_workers_load_no_model_library() -> None:
    [result] = preprocess(items(["imports"]), SETTINGS, num_workers=1, make=Poisoned)

    assert isinstance(result, Failure)
    assert result.message == "[]"


def test_closing_half_way_ends_the_workers_at_once() -> None:
    before = child_processes()
    results = preprocess(
        items(["fine", *["hang"] * 20]), SETTINGS, num_workers=2, ahead=SINGLY, make=Poisoned
    )
    started = time.monotonic()
    next(results)
    assert child_processes() - before

    results.close()

    assert others_end(before)
    assert time.monotonic() - started < 30


def test_an_image_that_takes_more_memory_than_a_decoder_may_use_is_not_called_too_large() -> None:
    settings = replace(SETTINGS, worker_memory_bytes=100 << 20)
    images = (ImageRef(data=picture(size=(7000, 7000))),)
    item = Chunk("s", 0, 1), Record("a", "s", 0, images, {"title": "fine"})

    [result] = preprocess(iter([item]), settings, num_workers=1)

    assert isinstance(result, Failure)
    assert (result.stage, result.code) == ("decode", "out_of_memory")


class Unstartable:
    """A preprocessor that cannot be made."""

    def __init__(self, settings: PreprocessSettings) -> None:
        os._exit(3)

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        raise AssertionError


class KilledAtFirst:
    """A preprocessor that others kill while it is made, as often as the file `root` has letters."""

    def __init__(self, settings: PreprocessSettings) -> None:
        assert settings.root is not None
        if left := settings.root.read_text():
            settings.root.write_text(left[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        self._prepare = Preprocessor(settings)

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        return self._prepare(chunk, record)


def test_a_worker_that_others_kill_while_it_starts_is_started_again(tmp_path: Path) -> None:
    settings = replace(SETTINGS, root=tmp_path / "lives")
    (tmp_path / "lives").write_text("four")

    results = list(preprocess(items(["a", "b"]), settings, num_workers=1, make=KilledAtFirst))

    assert [code_of(result) for result in results] == ["ok", "ok"]


def test_a_worker_that_is_killed_whenever_it_starts_ends_the_run_and_fails_no_record(tmp_path: Path) -> None:
    before = child_processes()
    settings = replace(SETTINGS, root=tmp_path / "lives")
    (tmp_path / "lives").write_text("a lot of them")

    with pytest.raises(PlacementError, match="A decoder was killed 5 times while it started"):
        list(preprocess(items(["a"]), settings, num_workers=1, make=KilledAtFirst))

    assert others_end(before)


class NeverReady:
    """A preprocessor that is not made within anybody's patience."""

    def __init__(self, settings: PreprocessSettings) -> None:
        time.sleep(1000)

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        raise AssertionError


def test_a_worker_that_does_not_start_in_time_is_not_said_to_have_been_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = child_processes()
    monkeypatch.setattr("glm4v_batch.preprocess._START_SECONDS", 0.5)

    with pytest.raises(PlacementError, match=r"A decoder did not start within 0\.5 s, 2 times over\."):
        list(preprocess(items(["a"]), SETTINGS, num_workers=1, make=NeverReady))

    assert others_end(before)


def test_worker_that_cannot_start_is_our_bug_and_no_failed_record() -> None:
    before = child_processes()

    with pytest.raises(RuntimeError, match="exit code 3"):
        list(preprocess(items(["a"]), SETTINGS, num_workers=1, make=Unstartable))

    assert others_end(before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_users_mistake_is_raised_as_such_out_of_a_worker(num_workers: int) -> None:
    settings = replace(SETTINGS, min_pixels=2000, max_pixels=1000)

    with pytest.raises(JobError, match=r"images\.min_pixels"):
        list(preprocess(items(["a"]), settings, num_workers=num_workers))


def test_what_passes_through_stays_with_the_driver() -> None:
    passed = pa.table({"note": ["x" * 50_000_000]})
    record = Record("a", "s", 0, (), {"title": "passed"}, passed)

    [result] = preprocess(iter([(Chunk("s", 0, 1), record)]), SETTINGS, num_workers=1, make=Poisoned)

    assert isinstance(result, Failure)
    assert result.message == "None"


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_what_rows_share_is_counted_for_none_of_them(kind: pa.DataType) -> None:
    texts = ["x" * 500 + str(row) for row in range(2000)]
    column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
    table = pa.table({"note": column})
    record = Record("a", "s", 0, (), {}, table.slice(7, 1))

    assert _item_bytes((Chunk("s", 0, 1), record)) < 600


def test_look_ahead_counts_texts_and_what_passes_through() -> None:
    taken = given_back = 0

    def counted() -> Iterator[Item]:
        nonlocal taken
        for taken in range(1, 31):
            passed = pa.table({"note": ["x" * 500_000]})
            fields = {"title": "x" * 500_000}
            yield Chunk("s", 0, 30), Record("a", "s", taken - 1, (), fields, passed)

    for _ in preprocess(counted(), SETTINGS, num_workers=1, ahead=LookAhead(bytes=4_000_000)):
        given_back += 1
        # The estimate of what becomes of a record begins at 1 MiB.
        assert taken - given_back <= 4 + 4

    assert given_back == 30


@pytest.mark.parametrize(
    ("ahead", "most"),
    [
        (LookAhead(records=12, records_per_group=3), 12 + 3),
        (LookAhead(bytes=10 * 22_000, records_per_group=2), 10 + 2 * 2),
        (LookAhead(records=1, bytes=1, records_per_group=2), 2 * 2),
    ],
    ids=["records", "bytes", "least"],
)
def test_look_ahead_is_bounded(ahead: LookAhead, most: int) -> None:
    taken = 0

    def counted() -> Iterator[Item]:
        nonlocal taken
        for item in items([str(row) for row in range(200)]):
            taken += 1
            yield item

    given_back = 0
    for _ in preprocess(counted(), SETTINGS, num_workers=1, ahead=ahead):
        given_back += 1
        assert taken - given_back <= most

    assert given_back == taken == 200


def test_no_records_make_no_requests() -> None:
    assert list(preprocess([], SETTINGS, num_workers=1)) == []


@pytest.mark.parametrize(
    ("ref", "stage", "code"),
    [
        (ImageRef(), "read", "image_missing"),
        (ImageRef(path="https://example.org/a.png"), "read", "url_not_allowed"),
        (ImageRef(data=b"%PDF"), "decode", "image_format"),
        (ImageRef(data=picture()[:60]), "decode", "image_truncated"),
        (ImageRef(data=picture(size=(400, 400))), "decode", "image_too_large"),
    ],
)
def test_bad_image_becomes_a_failure_with_its_stage_and_code(ref: ImageRef, stage: str, code: str) -> None:
    settings = replace(SETTINGS, limits=ImageLimits(max_image_pixels=100_000))
    record = Record("a", "s", 5, (ref,), {"title": ""})

    [result] = preprocess([(Chunk("s", 4, 2), record)], settings, num_workers=0)

    assert isinstance(result, Failure)
    assert (result.record_id, result.chunk_id, result.row) == ("a", "s#4+2", 5)
    assert (result.stage, result.code) == (stage, code)


def test_record_that_its_source_left_out_says_how_large_it_was() -> None:
    record = Record("a", "s", 0, (ImageRef(),), {"title": None}, oversize_bytes=200 * 1024**2)

    [result] = preprocess([(Chunk("s", 0, 1), record)], SETTINGS, num_workers=0)

    assert isinstance(result, Failure)
    assert (result.stage, result.code) == ("read", "record_too_large")
    assert result.message == "its cells take 200.00 MiB"


def test_more_images_than_the_context_holds_are_not_all_decoded() -> None:
    images = (ImageRef(data=picture(size=(600, 600))),) * 100 + (ImageRef(data=b"not reached"),)

    [result] = preprocess(
        [(Chunk("s", 0, 1), Record("a", "s", 0, images, {"title": ""}))], SETTINGS, num_workers=0
    )

    assert isinstance(result, Failure)
    assert (result.stage, result.code) == ("render", "prompt_too_long")


def test_a_decoder_that_others_kill_costs_no_record() -> None:
    results = preprocess(items(["fine"] * 40), SETTINGS, num_workers=2, ahead=SINGLY)
    rows = []

    for result in results:
        rows.append(result.row)
        assert isinstance(result, Request)
        if result.row % 10 == 5:
            for pid in child_processes():
                with suppress(ProcessLookupError):  # one that was killed before goes meanwhile
                    os.kill(pid, signal.SIGKILL)

    assert rows == list(range(40))


def test_unforeseen_error_becomes_a_failure_with_its_type_and_place_and_quotes_nothing() -> None:
    record = Record("a", "s", 0, (), {"other": "\u202ex"})

    [result] = preprocess([(Chunk("s", 0, 1), record)], SETTINGS, num_workers=0)

    assert isinstance(result, Failure)
    assert result.code == "preprocess_error"
    assert re.fullmatch(r"KeyError at templates\.py line \d+", result.message)


@given(st.text(max_size=400))
def test_sanitised_message_is_one_short_printable_line(text: str) -> None:
    message = sanitise(text)

    assert len(message) <= 200
    assert message.replace(" ", "").isprintable() or any(character.isspace() for character in message)
    assert "\n" not in message
    assert "\u202e" not in message


def test_sanitised_message_holds_no_address() -> None:
    assert sanitise("<Image at 0x7f21c0a41f90>\n\u202e") == "<Image at 0x…>\\n\\u202e"


def test_killed_driver_leaves_no_worker(tmp_path: Path) -> None:
    program = tmp_path / "driver.py"
    program.write_text(
        textwrap.dedent("""
        import sys, time
        sys.path[:0] = sys.argv[1:]
        from test_preprocess import SETTINGS, SINGLY, Poisoned, child_processes, items
        from glm4v_batch.preprocess import preprocess

        if __name__ == "__main__":
            titles = ["fine"] + ["hang"] * 9
            results = preprocess(items(titles), SETTINGS, num_workers=2, ahead=SINGLY, make=Poisoned)
            next(results)
            while len(child_processes()) < 2:
                time.sleep(0.05)
            print(*child_processes(), flush=True)
            time.sleep(60)
        """)
    )
    folders = [str(Path(__file__).parent), str(TINY.parents[1] / "pipeline")]
    with subprocess.Popen([sys.executable, str(program), *folders], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        workers = [int(pid) for pid in driver.stdout.readline().split()]
        driver.kill()

    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert len(workers) == 2
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    return state_and_parent(Path(f"/proc/{pid}/stat"))[0] != "Z"
