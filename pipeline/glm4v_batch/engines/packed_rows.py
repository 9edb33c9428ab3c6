"""The rows that decode, and one packed step of them: everything stays on the device."""

# R rows, T tokens of a step, N of them of prompts, F visual tokens, D hidden size, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from glm4v_batch.engines.packed_attention import Packing, Sequences
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.job import GenerationSettings
from glm4v_batch.kv_pool import KVPool
from glm4v_batch.next_tokens import RowHistory, next_tokens

NO_TOKEN = -1
"""Stands for a row that has no next token."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one prompt that a step prefills.

    input_ids     int64 [n] on the host
    positions     int64 [3, n] on the host
    image_places  int64 [F] on the host, which of the *n* tokens stand for images
    features      [F, D] on the device
    pool_place    where the piece's first key goes in the pool
    num_before    tokens of the prompt that are in the pool already, right before that place
    """

    row: int
    input_ids: Tensor
    positions: Tensor
    image_places: Tensor
    features: Tensor | None
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
        self._eos = torch.tensor(list(eos_token_ids), device=device)
        self._seen: Tensor | None = None
        if generation.repetition_penalty != 1:
            vocabulary = model.text_config.vocab_size
            self._seen = torch.zeros(max_rows, vocabulary, dtype=torch.bool, device=device)
        text = model.text_config
        self._group = text.num_attention_heads // text.num_key_value_heads

    def enter(self, entries: Sequence[Entry]) -> None:
        """Set rows up for new requests. They decode once a piece has ended their prompt."""
        columns = [
            [0, e.pool_start, len(e.input_ids), e.position_offset, 0, e.max_new_tokens, e.seed]
            for e in entries
        ]
        rows = self._send(torch.tensor([e.row for e in entries]))
        self._numbers[:, rows] = self._send(torch.tensor(columns).T.contiguous())
        self._is_live[rows] = False
        if self._seen is not None:
            for entry in entries:
                self._seen[entry.row] = False
                self._seen[entry.row, self._send(entry.input_ids)] = True

    @torch.inference_mode()
    def leave(self) -> None:
        """Let no row decode any more."""
        self._is_live.zero_()

    def step(self, pieces: Sequence[Piece], num_rows: int, most_keys: int) -> Tensor:
        """Prefill *pieces*, decode the live ones of the first *num_rows* rows.

        *most_keys* is the length that no row and no prompt exceeds. Returns the next token of each row,
        int64 [R] on the device, or NO_TOKEN. Nothing of a row changes before the end, so that a step that
        ran out of memory can be taken again.
        """
        host = _HostStep(pieces, num_rows)
        numbers = self._send(host.numbers)
        ids_N, writes_N, places_F, last_R, is_fresh_R = torch.split(numbers[: host.num_lengths], host.lengths)
        positions_3N = numbers[host.num_lengths :].view(3, -1)
        embeds = self._model.embed(torch.cat([ids_N, self._token[:num_rows]]))
        if len(places_F):
            features = torch.cat([piece.features for piece in pieces if piece.features is not None])
            embeds.index_copy_(0, places_F, features.to(embeds.dtype))
        positions_R = (self._index + self._offset)[:num_rows].expand(3, -1)
        hidden = self._model.forward(
            embeds,
            torch.cat([positions_3N, positions_R], dim=1),
            self._packing(host, writes_N, num_rows, most_keys),
            self._pool,
        )
        tokens_R = self._choose(self._model.logits(hidden, last_R), num_rows)
        return self._advance(tokens_R, is_fresh_R.bool())

    def _packing(self, host: "_HostStep", writes_N: Tensor, num_rows: int, most_keys: int) -> Packing:
        is_live, scratch = self._is_live[:num_rows], self._scratch[:num_rows]
        start, index = self._start[:num_rows], self._index[:num_rows]
        # What does not live writes behind the pool, and reads itself there.
        row_keys = torch.where(is_live, start, scratch)
        row_sizes = torch.where(is_live, index + 1, 1)
        ends, key_starts, key_counts = self._send(host.pieces).int()
        return Packing(
            writes=torch.cat([writes_N, row_keys + row_sizes - 1]),
            num_prompt=host.num_prompt,
            pieces=Sequences(ends, key_starts, key_counts[:-1], host.longest),
            rows=Sequences(
                ends=(torch.arange(num_rows + 1, device=start.device) * self._group).int(),
                key_starts=torch.nn.functional.pad(row_keys, (0, 1)).int(),
                key_counts=row_sizes.int(),
                longest=self._group,
            ),
            most_keys=most_keys,
        )

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

    def _send(self, tensor: Tensor) -> Tensor:
        if self._model.device.type == "cuda":
            return tensor.pin_memory().to(self._model.device, non_blocking=True)
        return tensor


class _HostStep:
    """What the host knows of a step, ready to be sent in one piece.

    *numbers* holds, one after another: ids [N], places in the pool [N], places of images [F], which token
    speaks for each row [R], whether the row's prompt ends here [R], positions [3 × N]. *pieces* is int64
    [3, S + 1]: where each piece begins, where its keys begin, how many its last token sees.
    """

    def __init__(self, pieces: Sequence[Piece], num_rows: int) -> None:
        sizes = [len(piece.input_ids) for piece in pieces]
        begins = list(accumulate(sizes, initial=0))
        self.num_prompt = begins[-1]
        self.longest = max(sizes, default=0)
        last = torch.arange(num_rows) + self.num_prompt
        is_fresh = torch.zeros(num_rows, dtype=torch.int64)
        for piece, end in zip(pieces, begins[1:], strict=True):
            if piece.ends_prompt:
                last[piece.row], is_fresh[piece.row] = end - 1, 1
        none = torch.zeros(0, dtype=torch.int64)
        places = [p.image_places + begin for p, begin in zip(pieces, begins, strict=False)]
        writes = [p.pool_place + torch.arange(size) for p, size in zip(pieces, sizes, strict=True)]
        parts = [
            torch.cat([none, *(piece.input_ids for piece in pieces)]),
            torch.cat([none, *writes]),
            torch.cat([none, *places]),
            last,
            is_fresh,
        ]
        self.lengths = [len(part) for part in parts]
        self.num_lengths = sum(self.lengths)
        positions = torch.cat([none.expand(3, 0), *(piece.positions for piece in pieces)], dim=1)
        self.numbers = torch.cat([*parts, positions.flatten()])
        keys = [piece.pool_place - piece.num_before for piece in pieces]
        seen = [piece.num_before + size for piece, size in zip(pieces, sizes, strict=True)]
        self.pieces = torch.tensor([begins, [*keys, 0], [*seen, 0]])
