"""Tokens equal to transformers' for any text, and no text that could become a special token."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.checkpoint import Checkpoint, read_checkpoint
from glm4v_batch.errors import JobError, RecordError
from glm4v_batch.prompts import PromptRenderer

TINY = Path(__file__).parents[2] / "data" / "tiny-glm4v"
CHECKPOINT = read_checkpoint(TINY)
RENDERER = PromptRenderer(CHECKPOINT, system=None, user="{text}")
IMAGE = CHECKPOINT.image_token_id
TEXTS = [
    "Describe this picture.",
    "",
    " ",
    "\n",
    "  leading and trailing \n\n ",
    "two\nlines\r\nand\ttabs",
    "don't, we'll, 12345 678",
    "naïve café — Ünïcödé 你好，世界 🎉👩‍👩‍👧 \u202eright to left",
    "{curly} {{braces}} {% raw %} {{ messages }}",
    "< |image| > <|ima ge|> [gMASK",
]
SPECIALS = [
    "<|image|>",
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>\n",
    "[gMASK]<sop>",
    "<think>",
    "</answer>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def render(texts: str, images: Sequence[int] = (1,), renderer: PromptRenderer = RENDERER) -> list[int]:
    return list(renderer.render({"text": texts}, images, 1).tolist())


def theirs(tokenizer: Any, text: str, *, system: str | None = None, num_images: int = 1) -> list[int]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_those_of_transformers(tokenizer: Any, text: str) -> None:
    assert render(text) == theirs(tokenizer, text)


@given(text=st.text(max_size=60))
def test_tokens_equal_those_of_transformers_for_any_text(tokenizer: Any, text: str) -> None:
    assert render(text) == theirs(tokenizer, text)


def test_tokens_equal_apply_chat_template_in_one_go(tokenizer: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": TEXTS[7]}]

    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )

    assert render(TEXTS[7]) == list(encoded["input_ids"])


@pytest.mark.parametrize("num_images", [0, 1, 2, 5])
@pytest.mark.parametrize("system", [None, "Be brief.\n"])
def test_system_and_images_stand_where_the_template_puts_them(
    tokenizer: Any, system: str | None, num_images: int
) -> None:
    renderer = PromptRenderer(CHECKPOINT, system=system, user="{text}")

    ids = render("What?", [1] * num_images, renderer)

    assert ids == theirs(tokenizer, "What?", system=system, num_images=num_images)


def test_each_placeholder_is_repeated_to_its_image_in_order() -> None:
    plain = render("What?", [1, 1, 1])
    at = [position for position, number in enumerate(plain) if number == IMAGE]

    ids = render("What?", [2, 1, 3])

    expected = [*plain[: at[0]], IMAGE, *plain[at[0] : at[2]], *[IMAGE] * 3, *plain[at[2] + 1 :]]
    assert ids == expected


@given(parts=st.lists(st.sampled_from([*SPECIALS, " ", "a", "\n"]), max_size=6))
def test_no_text_of_a_record_becomes_a_special_token(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts)
    added = set(tokenizer.added_tokens_decoder)

    ids = render(text, [3])

    assert [number for number in ids if number in added] == [
        number for number in render("", [3]) if number in added
    ]
    assert tokenizer.decode(ids) == tokenizer.decode(render("", [3])).replace(
        "<|end_of_image|>", "<|end_of_image|>" + text
    )


def test_prompt_of_the_job_is_plain_text_too() -> None:
    renderer = PromptRenderer(CHECKPOINT, system="<|image|>", user="<think>{text}<|image|>")

    assert render("", [2], renderer).count(IMAGE) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type"'])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(JobError, match="cannot be read as a tokenizer"):
        PromptRenderer(
            replace(CHECKPOINT, tokenizer_file=tmp_path / "tokenizer.json"), system=None, user="{text}"
        )


def test_the_system_message_stands_as_it_is(tokenizer: Any) -> None:
    renderer = PromptRenderer(CHECKPOINT, system="Answer as {json}.", user="{text}")

    assert render("a", [1], renderer) == theirs(tokenizer, "a", system="Answer as {json}.")


@pytest.mark.parametrize("sentinel", ["\ue000user\ue001", "\ue000system\ue001", "\u2003\u2002"])
def test_sentinels_in_a_record_are_text(tokenizer: Any, sentinel: str) -> None:
    renderer = PromptRenderer(CHECKPOINT, system=sentinel, user="{text}!")

    ids = render(sentinel, [1], renderer)

    assert ids == theirs(tokenizer, sentinel + "!", system=sentinel)


@pytest.mark.parametrize("filter_name", ["trim", "string"])
def test_template_that_strips_text_strips_the_record(tokenizer: Any, filter_name: str) -> None:
    template = CHECKPOINT.chat_template.replace("{{ item.text }}", f"{{{{ item.text | {filter_name} }}}}")
    renderer = PromptRenderer(replace(CHECKPOINT, chat_template=template), system=None, user="{text}")

    ids = render(" \n spaced out \n", [1], renderer)

    expected = "spaced out" if filter_name == "trim" else " \n spaced out \n"
    assert ids == render(expected)


def test_generation_tag_is_accepted_and_ignored() -> None:
    template = CHECKPOINT.chat_template + "{% generation %}{% endgeneration %}"

    renderer = PromptRenderer(replace(CHECKPOINT, chat_template=template), system=None, user="{text}")

    assert render("a", [1], renderer) == render("a")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("<|image|>", "does not repeat the text"),
        ("<|image|>{{ messages[0].content[-1].text }}{{ messages[0].content[-1].text }}", "does not repeat"),
        ("<|image|>{{ messages[0].content[-1].text | upper }}", "does not repeat"),
        ("<|image|>{{ messages[0].content[-1].text | replace('a', 'b') }}", "rewrites the text"),
        ("{{ messages[0].content[-1].text }}", "does not write one image token"),
        ("<|image|><|image|>{{ messages[0].content[-1].text }}", "does not write one image token"),
        ("{{ raise_exception('no images') }}", "no images"),
        ("{{ messages.append(1) }}", "fails on a prompt"),
        ("{% if %}", "is no Jinja template"),
    ],
)
def test_unusable_chat_template_is_a_job_error(template: str, fault: str) -> None:
    with pytest.raises(JobError, match=fault):
        PromptRenderer(replace(CHECKPOINT, chat_template=template), system=None, user="{text}")


def test_prompt_that_leaves_no_room_for_the_answer_is_too_long() -> None:
    prompt_tokens = len(render("a"))
    renderer = PromptRenderer(
        replace(CHECKPOINT, context_tokens=prompt_tokens + 10), system=None, user="{text}"
    )

    assert len(renderer.render({"text": "a"}, [1], 10)) == prompt_tokens
    with pytest.raises(RecordError) as caught:
        renderer.render({"text": "a"}, [1], 11)

    assert (caught.value.stage, caught.value.code) == ("render", "prompt_too_long")


def test_megabytes_of_text_are_refused_without_being_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(_: object, text: str) -> list[int]:
        raise AssertionError(f"{len(text)} characters were encoded")

    monkeypatch.setattr(PromptRenderer, "_encode", encode)

    with pytest.raises(RecordError, match="2,000,000 characters exceed") as caught:
        RENDERER.render({"text": "a" * 2_000_000}, [1], 8)

    assert (caught.value.stage, caught.value.code) == ("render", "prompt_too_long")


def test_null_column_fails_the_record() -> None:
    with pytest.raises(RecordError) as caught:
        RENDERER.render({"text": None}, [1], 1)

    assert caught.value.stage == "render"


def test_half_a_surrogate_pair_fails_the_record() -> None:
    with pytest.raises(RecordError) as caught:
        render("\ud83d")

    assert (caught.value.stage, caught.value.code) == ("render", "text_not_utf8")


@given(ids=st.lists(st.integers(0, 685), max_size=30))
def test_decoding_equals_transformers(tokenizer: Any, ids: list[int]) -> None:
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    assert RENDERER.decode(ids) == expected


def test_decoding_drops_special_tokens_and_keeps_thinking(tokenizer: Any) -> None:
    ids = tokenizer("<think>red</think><|endoftext|> box", add_special_tokens=False)["input_ids"]

    assert RENDERER.decode(ids) == "<think>red</think> box"


def test_shown_prompt_counts_the_placeholders_of_each_image() -> None:
    ids = render("Which is red? <|image|>", [4, 2])

    assert RENDERER.show(ids) == (
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|>×4<|end_of_image|>"
        "<|begin_of_image|><|image|>×2<|end_of_image|>Which is red? <|image|><|assistant|>\n"
    )


def test_tokens_that_only_tokenizer_config_adds_are_known(tmp_path: Path) -> None:
    import json

    from transformers import AutoTokenizer

    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["extra_special_tokens"].append("<|late|>")
    path.write_text(json.dumps(config))
    checkpoint: Checkpoint = read_checkpoint(tmp_path / "model")
    late = replace(checkpoint, chat_template=checkpoint.chat_template.replace("<sop>", "<|late|>"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")

    ids = render("a", [1], PromptRenderer(late, system=None, user="{text}"))

    assert ids[1] == theirs.convert_tokens_to_ids("<|late|>")
    assert theirs.decode(ids, skip_special_tokens=True) == RENDERER.decode(render("a"))
