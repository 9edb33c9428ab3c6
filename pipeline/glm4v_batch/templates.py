"""Prompt templates: literal text with {column} placeholders, filled in one pass.

No `str.format` and no Jinja: what a record holds is never read as a template itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4v_batch.errors import RecordError


class TemplateError(ValueError):
    """A prompt whose braces do not match. The message continues a sentence about the setting."""


class BrokenText(str):
    """A record's text that was not UTF-8, with replacement characters for what could not be read.

    A source hands it on as it would any text, so that passed-through columns can be written;
    a prompt refuses it, because the model would be asked something else than the record says.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands in the prompt as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """The place of one column's value."""

    name: str


Piece = Literal | Column


def parse_template(text: str) -> tuple[Piece, ...]:
    """The pieces of *text*, in which {name} is a column and {{ and }} are single braces.

    >>> parse_template("Title: {title}")
    (Literal(text='Title: '), Column(name='title'))
    """
    pieces: list[Piece] = []
    literal, position = "", 0
    while position < len(text):
        if text[position : position + 2] in ("{{", "}}"):
            literal, position = literal + text[position], position + 2
        elif text[position] == "{":
            pieces += [Literal(literal)] if literal else []
            pieces.append(_column(text, position))
            literal, position = "", text.index("}", position) + 1
        elif text[position] == "}":
            raise TemplateError(_unmatched(text, position, "closes nothing"))
        else:
            stop = _next_brace(text, position)
            literal, position = literal + text[position:stop], stop
    return (*pieces, Literal(literal)) if literal else tuple(pieces)


def columns_of(text: str) -> tuple[str, ...]:
    """The columns that *text* asks for, each once, in the order of their first appearance."""
    return tuple(dict.fromkeys(piece.name for piece in parse_template(text) if isinstance(piece, Column)))


def fill(pieces: Sequence[Piece], fields: Mapping[str, Any]) -> str:
    """The prompt of a record with these *fields*. A value that is no text or number fails the record."""
    return "".join(
        piece.text if isinstance(piece, Literal) else _as_text(piece.name, fields[piece.name])
        for piece in pieces
    )


def _as_text(column: str, value: Any) -> str:
    if isinstance(value, BrokenText):
        raise RecordError("read", "text_not_utf8", f"the text of column {column} is not valid UTF-8")
    if isinstance(value, str):
        return value
    if value is None:
        raise RecordError(
            "render", "prompt_missing_column", f"column {column}, which the prompt needs, is null"
        )
    if isinstance(value, (int, float)):
        return str(value)
    kind = type(value).__name__
    raise RecordError(
        "render", "prompt_column_type", f"column {column} holds a {kind}, which is no text or number"
    )


def _column(text: str, start: int) -> Column:
    stop = _next_brace(text, start + 1)
    if stop == len(text) or text[stop] == "{":
        raise TemplateError(_unmatched(text, start, "is never closed"))
    if stop == start + 1:
        raise TemplateError(f"names no column between the braces at {_place(text, start)}")
    return Column(text[start + 1 : stop])


def _next_brace(text: str, start: int) -> int:
    found = [at for at in (text.find("{", start), text.find("}", start)) if at >= 0]
    return min(found, default=len(text))


def _unmatched(text: str, position: int, fault: str) -> str:
    brace = text[position]
    return f"has a {brace} at {_place(text, position)} that {fault}. Write {brace * 2} for a plain brace"


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position)
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return f"character {column}" if line == 0 else f"character {column} of its line {line + 1}"
