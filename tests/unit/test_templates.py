"""What a prompt template means, and what it refuses."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import RecordError
from glm4v_batch.templates import (
    BrokenText,
    Column,
    Literal,
    TemplateError,
    columns_of,
    fill,
    parse_template,
)

names = st.text(min_size=1, max_size=10).filter(lambda text: not set(text) & {"{", "}"})


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@given(text=st.text())
def test_escaped_text_comes_out_as_it_went_in(text: str) -> None:
    pieces = parse_template(escaped(text))

    assert fill(pieces, {}) == text


@given(parts=st.lists(st.tuples(st.text(), names)), tail=st.text())
def test_columns_are_found_among_any_text_in_order(parts: list[tuple[str, str]], tail: str) -> None:
    template = "".join(f"{escaped(text)}{{{name}}}" for text, name in parts) + escaped(tail)

    filled = fill(parse_template(template), {name: f"<{name}>" for _, name in parts})

    assert filled == "".join(f"{text}<{name}>" for text, name in parts) + tail
    assert columns_of(template) == tuple(dict.fromkeys(name for _, name in parts))


@given(value=st.text())
def test_a_value_is_never_read_as_a_template(value: str) -> None:
    assert fill(parse_template("{a}{b}"), {"a": value, "b": "{a}"}) == value + "{a}"


def test_three_braces_are_a_plain_brace_and_a_column() -> None:
    assert parse_template("{{{a}}}") == (Literal("{"), Column("a"), Literal("}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Title: {title", "has a { at character 8 that is never closed. Write {{ for a plain brace"),
        ("a {b {c}", "has a { at character 3 that is never closed. Write {{ for a plain brace"),
        ("a } b", "has a } at character 3 that closes nothing. Write }} for a plain brace"),
        ("one\ntwo {}", "names no column between the braces at character 5 of its line 2"),
    ],
)
def test_unbalanced_braces_are_refused_with_their_place(template: str, message: str) -> None:
    with pytest.raises(TemplateError) as raised:
        parse_template(template)

    assert str(raised.value) == message


@given(template=st.text(alphabet="{}ab\n"))
def test_any_text_is_a_template_or_refused(template: str) -> None:
    try:
        pieces = parse_template(template)
    except TemplateError:
        return

    num_columns = sum(isinstance(piece, Column) for piece in pieces)
    assert fill(pieces, dict.fromkeys(columns_of(template), "x")).count("x") == num_columns


@pytest.mark.parametrize(("value", "text"), [("s", "s"), (3, "3"), (0.5, "0.5"), (True, "True")])
def test_text_and_numbers_are_filled_in(value: object, text: str) -> None:
    assert fill(parse_template("{a}"), {"a": value}) == text


@pytest.mark.parametrize(
    ("value", "stage", "code"),
    [
        (None, "render", "prompt_missing_column"),
        ([1], "render", "prompt_column_type"),
        ({"a": 1}, "render", "prompt_column_type"),
        (b"bytes", "render", "prompt_column_type"),
        (BrokenText("caf\ufffd"), "read", "text_not_utf8"),
    ],
)
def test_other_values_fail_the_record_and_are_not_quoted(value: object, stage: str, code: str) -> None:
    with pytest.raises(RecordError) as raised:
        fill(parse_template("{title}"), {"title": value})

    assert (raised.value.stage, raised.value.code) == (stage, code)
    assert "title" in str(raised.value)
    assert str(value) not in str(raised.value) or value is None


def test_broken_text_crosses_process_borders_as_itself() -> None:
    assert type(pickle.loads(pickle.dumps(BrokenText("x")))) is BrokenText
