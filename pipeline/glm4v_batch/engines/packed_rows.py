"""The rows that decode, and one packed step of them: everything stays on the device."""

# R rows, T tokens of a step, N of them of prompts, S pieces, F visual tokens, D hidden size, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glm4v_batch.engines.packed_attention import Packing, Sequences
from glm4v_batch.engines.packed_graphs import Graphs
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_vision import sent
from glm4v_batch.job import GenerationSettings
from glm4v_batch.kv_pool import KVPool
from glm4v_batch.next_tokens import RowHistory, next_tokens
from glm4v_batch.packed_limits import rounded_tokens

NO_TOKEN = -1
"""Stands for a row that has no next token."""

# As many as the attention kernel has slots for anyway.
_FEWEST_PIECES = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one prompt that a step prefills.

    input_ids     int64 [n] on the host
    positions     int64 [3, n] on the host
    image_places  int64 [F] on the host, which of the *n* tokens stand for images
    features      [F, D] on the device, in parts
    pool_place    where the piece's first key goes in the pool
    num_before    tokens of the prompt that are in the pool already, right before that place
    """

    row: int
    input_ids: Tensor
    positions: Tensor
    image_places: Tensor
    features: Sequence[Tensor]
    pool_place: int
    num_before: int
    ends_prompt: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """What a row starts with: its stretch of the pool, its prompt, and when its answer ends at the latest.

    *position_offset* is what positions are ahead of the count of tokens; *input_ids* is int64 on the host.
    """

    row: int
    pool_start: int
    input_ids: Tensor
    position_offset: int
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computes with, on the device of the first layer.

    embeds     [T, D]
    positions  int64 [3, T]
    last       int64 [R], which token speaks for each row
    """

    embeds: Tensor
    positions: Tensor
    packing: Packing
    last: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """What all steps have in common that one graph serves."""
        return (self.packing.num_prompt, len(self.packing.pieces.key_counts), len(self.last))

    def tensors(self) -> list[Tensor]:
        """All of it, in an order of its own."""
        packing = self.packing
        sequences = [
            tensor
            for part in (packing.pieces, packing.rows, packing.speakers)
            for tensor in (part.ends, part.key_starts, part.key_counts)
        ]
        return [self.embeds, self.positions, packing.writes, self.last, *sequences]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Step":
        """The same step, of other tensors in that order."""
        embeds, positions, writes, last, *sequences = tensors
        parts = [Sequences(*sequences[begin : begin + 3]) for begin in (0, 3, 6)]
        return Step(embeds, positions, Packing(writes, self.packing.num_prompt, *parts), last)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How much a step has in hand: pieces of prompts, their tokens, rows."""

    num_pieces: int
    num_prompt: int
    num_rows: int

    def rounded_up(self) -> "StepSizes":
        """One of few sizes, so that few graphs serve all steps. A piece more takes what is filled up."""
        if not self.num_prompt:
            return self
        num_pieces = max(_FEWEST_PIECES, 1 << self.num_pieces.bit_length())
        num_prompt = rounded_tokens(self.num_prompt + self.num_rows) - self.num_rows
        return StepSizes(num_pieces, num_prompt, self.num_rows)


class _Numbers(NamedTuple):
    """What the host knows of a step, int64: it travels as one tensor.

    input_ids     [N] of the prompts' tokens
    writes        [N], their places in the pool
    positions     [3 × N]
    last          [R], which token speaks for each row
    is_fresh      [R], whether the row's prompt ends here
    pieces        [3 × (S + 1)]: where each begins, where its keys begin, how many its last token sees
    image_places  [F], which tokens stand for images
    """

    input_ids: Tensor
    writes: Tensor
    positions: Tensor
    last: Tensor
    is_fresh: Tensor
    pieces: Tensor
    image_places: Tensor


class DecodeRows:
    """What the device knows of each row, and the step that moves all of them by one token."""

    def __init__(
        self,
        model: PackedModel,
        pool: KVPool,
        max_rows: int,
        generation: GenerationSettings,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._model = model
        self._pool = pool
        self._generation = generation
        device = model.device
        numbers = torch.zeros(7, max_rows, dtype=torch.int64, device=device)
        self._numbers = numbers
        self._token, self._start, self._index, self._offset, self._made, self._limit, self._seed = numbers
        self._is_live = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._scratch = pool.num_tokens + torch.arange(max_rows, device=device)
        self._ends = torch.arange(max_rows + 1, device=device, dtype=torch.int32)
        self._eos = torch.tensor(list(eos_token_ids), device=device)
        self._seen: Tensor | None = None
        if generation.repetition_penalty != 1:
            vocabulary = model.text_config.vocab_size
            self._seen = torch.zeros(max_rows, vocabulary, dtype=torch.bool, device=device)
        self._graphs: Graphs[Step] | None = Graphs("steps") if model.has_graphs else None

    def enter(self, entries: Sequence[Entry]) -> None:
        """Set rows up for new requests. They decode once a piece has ended their prompt."""
        # A row that has not written yet stands at a token of its prompt: each step counts it as seen.
        columns = [
            [
                int(e.input_ids[-1]), e.pool_start, len(e.input_ids), e.position_offset,
                0, e.max_new_tokens, e.seed,
            ]
            for e in entries
        ]  # fmt: skip
        rows = sent(torch.tensor([e.row for e in entries]), self._model.device)
        self._numbers[:, rows] = sent(torch.tensor(columns).T.contiguous(), self._model.device)
        # To assign False would copy it from the host, and wait for all that is under way.
        self._is_live.index_fill_(0, rows, value=False)
        if self._seen is not None:
            for entry in entries:
                seen = self._seen[entry.row].zero_()
                seen.index_fill_(0, sent(entry.input_ids, self._model.device), value=True)

    @torch.inference_mode()
    def leave(self) -> None:
        """Let no row decode any more."""
        self._is_live.zero_()

    def forget_graphs(self) -> None:
        """Give up the memory of graphs, once nothing is under way; they are recorded again as they come."""
        if self._graphs is not None:
            self._graphs.forget()

    def step(self, pieces: Sequence[Piece], num_rows: int) -> Tensor:
        """Prefill *pieces*, decode the live ones of the first *num_rows* rows.

        Returns the next token of each row, int64 [R] on the device, or NO_TOKEN. Nothing of a row changes
        before the end, so that a step that ran out of memory can be taken again.
        """
        num_prompt = sum(len(piece.input_ids) for piece in pieces)
        sizes = StepSizes(len(pieces), num_prompt, num_rows)
        if self._graphs:
            # What a graph is made for must not depend on how the prompt's tokens are shared out.
            sizes = sizes.rounded_up()
        # Behind the rows' own places there is one more, which nothing reads but what is thrown away.
        on_host, lengths = _numbers_of(
            pieces, sizes, padding_place=self._pool.num_tokens + len(self._is_live)
        )
        numbers = _Numbers(*torch.split(sent(on_host, self._model.device), lengths))
        step = self._step_of(pieces, numbers)
        tokens_R = self._graphs.run(self._tokens_of, step) if self._graphs else self._tokens_of(step)
        return self._advance(tokens_R, numbers.is_fresh.bool())

    def _step_of(self, pieces: Sequence[Piece], numbers: _Numbers) -> Step:
        num_rows = len(numbers.last)
        embeds = self._model.embed(torch.cat([numbers.input_ids, self._token[:num_rows]]))
        features = [part for piece in pieces for part in piece.features]
        if features:
            embeds.index_copy_(0, numbers.image_places, torch.cat(features).to(embeds.dtype))
        positions_R = (self._index + self._offset)[:num_rows].expand(3, -1)
        positions = torch.cat([numbers.positions.view(3, -1), positions_R], dim=1)
        return Step(embeds, positions, self._packing(numbers), numbers.last)

    def _packing(self, numbers: _Numbers) -> Packing:
        num_rows = len(numbers.last)
        is_live, scratch = self._is_live[:num_rows], self._scratch[:num_rows]
        start, index = self._start[:num_rows], self._index[:num_rows]
        # What does not live writes behind the pool, and reads itself there.
        row_keys = torch.where(is_live, start, scratch)
        row_sizes = torch.where(is_live, index + 1, 1)
        # Where a prompt ends the row has as many tokens as the prompt: its last one speaks.
        is_fresh = numbers.is_fresh.bool()
        heard_keys = torch.where(is_fresh, start, row_keys)
        heard_sizes = torch.where(is_fresh, index, row_sizes)
        begins, key_starts, key_counts = numbers.pieces.view(3, -1).int()
        ends = self._ends[: num_rows + 1]
        return Packing(
            writes=torch.cat([numbers.writes, row_keys + row_sizes - 1]),
            num_prompt=len(numbers.input_ids),
            pieces=Sequences(begins, key_starts[:-1], key_counts[:-1]),
            rows=Sequences(ends, row_keys.int(), row_sizes.int()),
            speakers=Sequences(ends, heard_keys.int(), heard_sizes.int()),
        )

    def _tokens_of(self, step: Step) -> Tensor:
        model = self._model
        hidden = model.forward(step.embeds, step.positions, step.packing, step.last, self._pool)
        return self._choose(model.logits(hidden), len(step.last))

    def _choose(self, logits_RV: Tensor, num_rows: int) -> Tensor:
        seen = None if self._seen is None else self._seen[:num_rows]
        history = RowHistory(self._seed[:num_rows], self._made[:num_rows], seen)
        return next_tokens(logits_RV, history, self._generation)

    def _advance(self, tokens_R: Tensor, is_fresh_R: Tensor) -> Tensor:
        num_rows = len(tokens_R)
        is_live = self._is_live[:num_rows]
        emits = is_live | is_fresh_R
        made = self._made[:num_rows] + emits
        has_ended = torch.isin(tokens_R, self._eos) | (made >= self._limit[:num_rows])
        token = torch.where(emits, tokens_R, self._token[:num_rows])
        index = self._index[:num_rows] + is_live
        lives_on = emits & ~has_ended
        answer = torch.where(emits, tokens_R, NO_TOKEN)
        # From here on nothing is allocated: all changes, or, where memory ran out above, none.
        if self._seen is not None:
            self._seen[:num_rows].scatter_(1, token[:, None], value=True)
        for kept, new in ((self._token, token), (self._index, index), (self._made, made)):
            kept[:num_rows].copy_(new)
        is_live.copy_(lives_on)
        return answer


def _numbers_of(pieces: Sequence[Piece], sizes: StepSizes, padding_place: int) -> tuple[Tensor, list[int]]:
    """The numbers one after another, and how many there are of each kind.

    Tokens that *sizes* has beyond those of *pieces* are one more piece, which writes to *padding_place*.
    """
    num_images = sum(len(piece.image_places) for piece in pieces)
    prompt, rows, slots = sizes.num_prompt, sizes.num_rows, sizes.num_pieces + 1
    lengths = [prompt, prompt, 3 * prompt, rows, rows, 3 * slots, num_images]
    numbers = np.zeros(sum(lengths), dtype=np.int64)
    ids, writes, positions, last, is_fresh, of_pieces, image_places = np.split(
        numbers, np.cumsum(lengths[:-1])
    )
    positions = positions.reshape(3, prompt)
    begins, key_starts, key_counts = of_pieces.reshape(3, slots)
    last[:] = np.arange(prompt, prompt + rows)
    begin = image = 0
    for place, piece in enumerate(pieces):
        size, num_places = len(piece.input_ids), len(piece.image_places)
        end = begin + size
        ids[begin:end] = piece.input_ids
        writes[begin:end] = np.arange(piece.pool_place, piece.pool_place + size)
        positions[:, begin:end] = piece.positions
        image_places[image : image + num_places] = piece.image_places.numpy() + begin
        begins[place], key_starts[place] = begin, piece.pool_place - piece.num_before
        key_counts[place] = piece.num_before + size
        if piece.ends_prompt:
            last[piece.row], is_fresh[piece.row] = end - 1, 1
        begin, image = end, image + num_places
    begins[len(pieces)], begins[len(pieces) + 1 :] = begin, prompt
    if begin < prompt:
        writes[begin:], key_starts[len(pieces)], key_counts[len(pieces)] = padding_place, padding_place, 1
    return torch.from_numpy(numbers), lengths
