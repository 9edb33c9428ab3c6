"""From a record's text to prompt tokens, and from generated tokens back to text.

The chat template is rendered once per number of images, with sentinels where the record's text
will stand. Special tokens are recognised in that rendering only: the record's text is encoded by a
second tokenizer that knows none, so nothing a record says can become one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from glm4v_batch.checkpoint import Checkpoint
from glm4v_batch.errors import JobError, RecordError
from glm4v_batch.templates import fill, parse_template

# Private-use characters, which no template contains; the spaces around them show what it strips.
_SENTINELS = ("\ue000system\ue001", "\ue000user\ue001")
_LEFT_PAD, _RIGHT_PAD = "\u2003\u2002", "\u2002\u2003"
_PROBES = (("be brief", "what is it"), (" \n a\n\n", "\n  b \n"))


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where the chat template puts a text of the record, and what it strips from it."""

    index: int
    strip_left: bool
    strip_right: bool

    def text(self, texts: Sequence[str]) -> str:
        text = texts[self.index]
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text


@dataclass(frozen=True, slots=True)
class _Run:
    """Text between two special tokens: encoded as one, because its tokens may span the slot's edges."""

    parts: tuple[str | _Slot, ...]

    def text(self, texts: Sequence[str]) -> str:
        return "".join(part if isinstance(part, str) else part.text(texts) for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """Where the visual tokens of the next image stand."""


_Segment = tuple[int, ...] | _Run | _Placeholder


class PromptRenderer:
    """Owns a checkpoint's tokenizer and chat template, and the job's prompt."""

    def __init__(self, checkpoint: Checkpoint, *, system: str | None, user: str) -> None:
        self._checkpoint = checkpoint
        self._system = system
        self._user = parse_template(user)
        self._special = _load_tokenizer(checkpoint)
        self._plain = _without_added_tokens(checkpoint)
        self._added: Mapping[int, AddedToken] = self._special.get_added_tokens_decoder()
        self._refuse_leaks()
        self._segments: dict[int, tuple[_Segment, ...]] = {}
        self._segments_for(1)

    def render(
        self, fields: Mapping[str, Any], image_tokens: Sequence[int], max_new_tokens: int
    ) -> NDArray[np.int32]:
        """The prompt of a record, each image's placeholder repeated to its *image_tokens*.

        Raises RecordError where a column is unusable, or prompt and answer exceed the context.
        """
        texts = (self._system or "", fill(self._user, fields))
        self._check_size(texts[1])
        ids: list[int] = []
        images = iter(image_tokens)
        for segment in self._segments_for(len(image_tokens)):
            match segment:
                case _Run():
                    ids += self._encode(segment.text(texts))
                case _Placeholder():
                    ids += [self._checkpoint.image_token_id] * next(images)
                case _:
                    ids += segment
        self._check_length(len(ids), max_new_tokens)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated *ids*, without special tokens; other added ones, as <think>, stay."""
        return str(self._special.decode(list(ids), skip_special_tokens=True))

    def show(self, ids: Sequence[int]) -> str:
        """A prompt as people read it: with its special tokens, each image's placeholders counted."""
        shown = ""
        for is_image, run in groupby(ids, key=lambda number: number == self._checkpoint.image_token_id):
            numbers = list(run)
            text = self._special.decode(numbers[:1] if is_image else numbers, skip_special_tokens=False)
            shown += f"{text}×{len(numbers)}" if is_image else text
        return shown

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        context_tokens = self._checkpoint.context_tokens
        if prompt_tokens + max_new_tokens > context_tokens:
            raise RecordError(
                "render",
                "prompt_too_long",
                f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed "
                f"the model's context of {context_tokens}",
            )

    def _check_size(self, text: str) -> None:
        # Encoding megabytes takes seconds and gigabytes. No token stands for more than the longest of them.
        context_tokens = self._checkpoint.context_tokens
        # A template may strip blanks, and a normaliser may shorten a text in ways that are not known here.
        if self._plain.normalizer is None and len(text.strip()) > context_tokens * self._longest_token:
            raise RecordError(
                "render",
                "prompt_too_long",
                f"{len(text):,} characters exceed the model's context of {context_tokens} tokens",
            )

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._plain.get_vocab()), default=1)

    def _encode(self, text: str) -> list[int]:
        try:
            # A batch of one, because only this call spares the offsets into the text.
            return list(self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        except TypeError as error:  # tokenizers takes a str that is not Unicode for none
            raise RecordError("render", "text_not_utf8", "the text holds half a surrogate pair") from error

    def _segments_for(self, num_images: int) -> tuple[_Segment, ...]:
        if num_images not in self._segments:
            skeleton = self._skeleton(num_images)
            self._probe(skeleton, num_images)
            self._segments[num_images] = self._split(skeleton, num_images)
        return self._segments[num_images]

    def _skeleton(self, num_images: int) -> _Run:
        """The rendered template with slots for the texts."""
        padded = [_LEFT_PAD + sentinel + _RIGHT_PAD for sentinel in _SENTINELS]
        rendered = self._render_template(padded, num_images)
        used = _SENTINELS if self._system is not None else _SENTINELS[1:]
        if any(rendered.count(sentinel) != 1 for sentinel in used):
            raise self._unusable("does not repeat the text of system and user exactly once")
        parts = [part for part in re.split("(" + "|".join(_SENTINELS) + ")", rendered) if part]
        return _Run(
            tuple(
                _slot(parts, at) if part in _SENTINELS else _unpadded(parts, at)
                for at, part in enumerate(parts)
            )
        )

    def _probe(self, skeleton: _Run, num_images: int) -> None:
        """Refuse a template that changes the text it is given in other ways than stripping it."""
        for texts in _PROBES:
            if skeleton.text(texts) != self._render_template(texts, num_images):
                raise self._unusable("rewrites the text that it is given")

    def _split(self, skeleton: _Run, num_images: int) -> tuple[_Segment, ...]:
        """Cut the skeleton at its added tokens; what has no slot is encoded once and for all."""
        numbers = {token.content: number for number, token in self._added.items()}
        longest_first = sorted(map(re.escape, numbers), key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        segments: list[_Segment] = []
        run: list[str | _Slot] = []
        for part in skeleton.parts:
            for piece in pattern.split(part) if isinstance(part, str) else [part]:
                if isinstance(piece, str) and piece in numbers:
                    segments += [*self._fixed_or_run(run), self._token(numbers[piece])]
                    run = []
                elif piece:
                    run.append(piece)
        segments += self._fixed_or_run(run)
        if sum(isinstance(segment, _Placeholder) for segment in segments) != num_images:
            image_token_id = self._checkpoint.image_token_id
            raise self._unusable(f"does not write one image token ({image_token_id}) per image")
        return tuple(segments)

    def _token(self, number: int) -> _Segment:
        token = self._added[number]
        if token.single_word or token.lstrip or token.rstrip:
            raise self._unusable(f"uses a token that depends on its neighbours: {token.content}")
        return _Placeholder() if number == self._checkpoint.image_token_id else (number,)

    def _fixed_or_run(self, parts: Sequence[str | _Slot]) -> list[_Segment]:
        if not parts:
            return []
        run = _Run(tuple(parts))
        if any(isinstance(part, _Slot) for part in parts):
            return [run]
        return [tuple(self._encode(run.text(())))]

    def _render_template(self, texts: Sequence[str], num_images: int) -> str:
        system, user = texts
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": user}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **_named_tokens(self._checkpoint),
            )
        except (jinja2.TemplateError, TypeError, LookupError) as error:
            raise self._unusable(f"fails on a prompt with {num_images} images: {error}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return _environment().from_string(self._checkpoint.chat_template)
        except jinja2.TemplateError as error:
            raise self._unusable(f"is no Jinja template: {error}") from error

    def _refuse_leaks(self) -> None:
        """Splitting cannot protect a token that the vocabulary also spells out of plain text."""
        for number, token in self._added.items():
            if number in self._encode(token.content):
                raise self._unusable(f"belongs to a tokenizer that reads {token.content} out of plain text")

    def _unusable(self, fault: str) -> JobError:
        return JobError(
            f"the chat template of {self._checkpoint.folder} {fault}.",
            hint="Use a checkpoint with the chat template of GLM-4V.",
        )


def _slot(parts: Sequence[str], at: int) -> _Slot:
    before = parts[at - 1] if at else ""
    after = parts[at + 1] if at + 1 < len(parts) else ""
    return _Slot(
        index=_SENTINELS.index(parts[at]),
        strip_left=not before.endswith(_LEFT_PAD),
        strip_right=not after.startswith(_RIGHT_PAD),
    )


def _unpadded(parts: Sequence[str], at: int) -> str:
    text = parts[at]
    text = text.removeprefix(_RIGHT_PAD) if at else text
    return text.removesuffix(_LEFT_PAD) if at + 1 < len(parts) else text


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer as transformers completes it: tokenizer.json, then what tokenizer_config.json adds."""
    try:
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    except Exception as error:  # noqa: BLE001, RUF100  the library raises nothing narrower
        raise JobError(
            f"{checkpoint.tokenizer_file} cannot be read as a tokenizer: {error}.",
            hint="Download the checkpoint again.",
        ) from None
    config = checkpoint.tokenizer_config
    described = config.get("added_tokens_decoder") or {}
    for number in sorted(described, key=int):
        flags = {name: value for name, value in described[number].items() if name in _TOKEN_FLAGS}
        tokenizer.add_tokens([AddedToken(described[number]["content"], **flags)])
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [token for token in _special_contents(checkpoint) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    return tokenizer


_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _without_added_tokens(checkpoint: Checkpoint) -> Tokenizer:
    description = json.loads(checkpoint.tokenizer_file.read_text(encoding="utf-8"))
    description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))


def _named_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token and their like, which a chat template may use by name."""
    named = {name: value for name, value in checkpoint.tokenizer_config.items() if name.endswith("_token")}
    contents = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _special_contents(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.tokenizer_config
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = list(extra.values()) if isinstance(extra, dict) else list(extra)
    contents = [entry["content"] if isinstance(entry, dict) else entry for entry in entries]
    return [*_named_tokens(checkpoint).values(), *contents]


class _Generation(Extension):
    """Accepts the tag that marks an assistant's text for training, and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt is not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
