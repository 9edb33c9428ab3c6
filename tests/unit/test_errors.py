"""Messages that show nothing of a record, and text that no terminal obeys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.errors import place_of, printable, said_by, sanitise

SECRET = "my secret caption"


@given(text=st.text(max_size=50))
def test_what_an_error_quotes_is_left_out(text: str) -> None:
    for message in (f"bad value {text!r} here", f"bad value '{text}' here", f"chunk {text.encode()!r} here"):
        said = said_by(ValueError(message))

        assert said.startswith("ValueError: ")
        assert said.endswith("… here")
        assert text not in said or text in "ValueError: bad value … here chunk … here"


def test_an_error_without_words_is_named_by_its_kind() -> None:
    assert said_by(KeyError(SECRET)) == "KeyError: …"
    assert said_by(ValueError()) == "ValueError"


def test_an_unforeseen_error_is_told_by_its_place_alone() -> None:
    with pytest.raises(KeyError) as caught:
        dict[str, int]()[SECRET]

    assert place_of(caught.value).startswith("KeyError at test_errors.py line ")


@given(st.text(max_size=300))
def test_printed_text_keeps_its_lines_and_can_be_printed_anywhere(text: str) -> None:
    shown = printable(text)

    assert shown.count("\n") == text.count("\n")
    shown.encode()
    assert not any(
        ord(character) < 32 or 127 <= ord(character) < 160 for character in shown if character != "\n"
    )


@pytest.mark.parametrize("text", ["\x1b[2J", "\u202egnp.exe", "\r", "\x00", "\ud800", "\u2028", "\x9b31m"])
def test_control_and_bidi_characters_are_escaped(text: str) -> None:
    for shown in (printable(text), sanitise(text)):
        assert "\\" in shown
        assert shown.isprintable()
        shown.encode()
