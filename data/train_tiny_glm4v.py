"""Make the bundled tiny GLM-4V checkpoint: tokenizer, configuration, and weights trained from scratch.

Training reuses the model's own modules, but runs the vision tower on padded batches (`TrainingTower`): the
tower of transformers splits a packed sequence image by image, with a host synchronisation in every block.

Example:
    python -m data.train_tiny_glm4v init --out data/tiny-glm4v
    python -m data.train_tiny_glm4v train --out data/tiny-glm4v --minutes 8.5
"""

import argparse
import io
import json
import math
import mmap
import multiprocessing
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from data.render_scenes import (
    COLOURS,
    MAX_PIXELS,
    MIN_PIXELS,
    SHAPES,
    TITLE_ADJECTIVES,
    TITLE_NOUNS,
    WORDS,
    Scene,
    caption_of,
    encode,
    encode_transparent,
    picture_size,
    questions_of,
    random_layout,
    random_title,
    scene,
    smart_resize,
    visual_tokens,
)
from PIL import Image, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "tiny-glm4v"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
MARKUP_TOKENS = ("<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")
CHAT_TEMPLATE = r"""[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'system' %}{{ '<|system|>\n' }}
{%- elif message.role == 'user' %}{{ '<|user|>\n' }}
{%- elif message.role == 'assistant' %}{{ '<|assistant|>\n' }}
{%- else %}{{ '<|observation|>\n' }}
{%- endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for item in message.content %}
{%- if item.type in ('image', 'image_url') or 'image' in item %}<|begin_of_image|><|image|><|end_of_image|>
{%- elif item.type == 'video' or 'video' in item %}<|begin_of_video|><|video|><|end_of_video|>
{%- elif item.type == 'text' %}{{ item.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif -%}
"""
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PIXEL_SETTINGS: dict[str, Any] = {
    "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "processor_class": "Glm4vProcessor",
}
CAPTION_PROMPT = "Describe this picture. Title: {title}"


def _corpus() -> list[str]:
    rng = Random("tokenizer")
    lines = []
    for _ in range(4000):
        layout = random_layout(rng)
        lines += [caption_of(layout), CAPTION_PROMPT.format(title=random_title(rng, layout))]
        lines += [text for _, pairs in questions_of(layout) for pair in pairs for text in pair]
    words = (*WORDS, *COLOURS, *SHAPES, *TITLE_ADJECTIVES, *TITLE_NOUNS)
    # Often enough that each becomes one token, with and without the space before it.
    lines += [f"{word} {word}" for word in words for _ in range(400)]
    return [_without_digits(line) for line in lines]


def _without_digits(line: str) -> str:
    # Merges between digits must never be learnt: each digit stays a token of its own.
    return "".join(" " if c.isdigit() else c for c in line)


def make_tokenizer() -> Tokenizer:
    """Train the byte-level BPE tokenizer on the language of the scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP_TOKENS])
    return tokenizer


def _model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    eos = [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]]
    text = {
        "model_type": "glm4v_text",
        "vocab_size": -(-tokenizer.get_vocab_size() // 8) * 8,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "attention_bias": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": eos,
        "dtype": "float32",
        # 8 frequencies of the rotated half of a head: 2 for time, 3 for rows, 3 for columns.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
        },
    }
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "text_config": text,
        "vision_config": _vision_config(192),
    }


def _vision_config(out_hidden_size: int) -> dict[str, Any]:
    return {
        "model_type": "glm4v_vision",
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 4,
        "image_size": 280,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "out_hidden_size": out_hidden_size,
        "intermediate_size": 256,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
    }


def write_files(folder: Path) -> None:
    """Write everything of the checkpoint but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = _model_config(tokenizer)["text_config"]["eos_token_id"]
    files: dict[str, dict[str, Any]] = {
        "config.json": _model_config(tokenizer),
        "generation_config.json": {"eos_token_id": eos, "pad_token_id": eos[0], "do_sample": False},
        "preprocessor_config.json": PIXEL_SETTINGS | {"image_processor_type": "Glm4vImageProcessor"},
        "video_preprocessor_config.json": PIXEL_SETTINGS | {"video_processor_type": "Glm4vVideoProcessor"},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 4096,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "pad_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "extra_special_tokens": list(SPECIAL_TOKENS),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def new_model(folder: Path) -> Any:
    """A model with fresh weights for the configuration in *folder*."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    factory: Any = AutoModelForImageTextToText
    model = factory.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, config.vision_config.depth)
    return model


def saved_model(folder: Path) -> Any:
    """The model whose weights are in *folder*, to train it further."""
    from transformers import AutoModelForImageTextToText

    factory: Any = AutoModelForImageTextToText
    return factory.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def _initialise(name: str, parameter: torch.Tensor, depth: int) -> None:
    # Wider than the 0.02 of large models, which is far too small at these widths, but residual branches
    # start small: training from nothing with a high learning rate needs both.
    if name.endswith(("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")):
        parameter.fill_(0.4)
    elif "position_embedding" in name:
        parameter.normal_(std=0.2)
    elif "embed_tokens" in name:
        parameter.normal_(std=0.5)
    elif "lm_head" in name:
        parameter.normal_(std=0.02)
    elif parameter.ndim >= 2:
        branch_end = "blocks" in name and name.endswith(("proj.weight", "down_proj.weight"))
        gain = (2 * depth) ** -0.5 if branch_end and "gate" not in name and "up_" not in name else 1.0
        gain = 3.0 if name.endswith("merger.down_proj.weight") else gain  # features as loud as embeddings
        parameter.normal_(std=gain * parameter[0].numel() ** -0.5)


def save_weights(model: Any, folder: Path) -> None:
    """Write model.safetensors, all or nothing, in the key layout of the Hub's checkpoints."""
    from safetensors.torch import save_file

    temporary = folder / ".model.safetensors.tmp"
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)  # safetensors creates it readable by its owner alone
    temporary.replace(folder / "model.safetensors")


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Pictures of similar size, batched together so that little is padded."""

    min_tokens: int
    max_tokens: int
    weight: float  # how often a batch of this class is made

    @property
    def max_patches(self) -> int:
        """Patches that a picture of this class has at most, rounded up for the attention kernels."""
        return -(-4 * self.max_tokens // 16) * 16


SIZE_CLASSES = (SizeClass(1, 36, 0.25), SizeClass(37, 64, 0.35), SizeClass(65, 100, 0.40))
PATCH_VALUES = 3 * 14 * 14
TURNS_PER_IMAGE = 2  # each picture is asked for its caption and for one answer


@dataclass(frozen=True, slots=True)
class Batch:
    """Rendered pictures (I) with two conversations (R = 2 I) each, right-padded to L tokens.

    *pixels* is uint8 [I, N, 588] with N patches; *grids* is [I, 2], patch rows and columns; *positions* is
    [3, I, L], shared by the conversations of a picture; *weights* [R, L] is above 0 where *labels* count.
    """

    pixels: Any
    grids: Any
    input_ids: Any
    labels: Any
    weights: Any
    positions: Any
    lengths: Any


@dataclass(frozen=True, slots=True)
class Language:
    """How a conversation becomes token ids."""

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    image_id: int
    end_id: int

    @classmethod
    def load(cls, folder: Path) -> "Language":
        """Read tokenizer.json from *folder*."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prefix = tokenizer.encode("[gMASK]<sop><|user|>\n<|begin_of_image|>").ids
        image_id, end_id = (tokenizer.token_to_id(token) for token in ("<|image|>", "<|user|>"))
        assert image_id is not None
        assert end_id is not None
        return cls(tokenizer, tuple(prefix), image_id, end_id)

    def turn(self, num_image_tokens: int, prompt: str, answer: str) -> tuple[list[int], int]:
        """Token ids of one conversation, and where its answer starts."""
        asked = self.tokenizer.encode(f"<|end_of_image|>{prompt}<|assistant|>\n").ids
        ids = [*self.prefix, *[self.image_id] * num_image_tokens, *asked]
        return [*ids, *self.tokenizer.encode(answer).ids, self.end_id], len(ids)


def patchify(image: Image.Image) -> tuple[np.ndarray, int, int]:
    """uint8 patches [P, 588] in the order of the image processor, and the patch rows and columns.

    One temporal copy only: the second one is identical.
    """
    size = smart_resize(*image.size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    rows, columns = size[1] // 14, size[0] // 14
    pixels = np.asarray(image).reshape(rows // 2, 2, 14, columns // 2, 2, 14, 3)
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5)
    return patches.reshape(rows * columns, PATCH_VALUES), rows, columns


def _training_scene(rng: Random, size_class: SizeClass, max_elements: int) -> Scene:
    while True:
        size = picture_size(rng)
        if size_class.min_tokens <= visual_tokens(*size) <= size_class.max_tokens:
            break
    drawn = scene(rng, size, max_elements)
    style = rng.random()
    if style < 0.25:
        kind = "jpeg" if style < 0.18 else "png-palette" if style < 0.22 else "webp"
        encoded = encode(drawn.image, kind, quality=rng.randint(88, 97))
    elif style < 0.32:
        encoded = encode_transparent(rng, drawn.layout, drawn.grey)
    else:
        return drawn
    return replace(drawn, image=Image.open(io.BytesIO(encoded)).convert("RGB"))


def image_positions(rows: int, columns: int, start: int, length: int) -> np.ndarray:
    """M-RoPE positions [3, length] of a conversation whose picture starts at token *start*."""
    rows, columns = rows // 2, columns // 2
    count = rows * columns
    positions = np.tile(np.arange(length) - count + max(rows, columns), (3, 1))
    positions[:, :start] = np.arange(start)
    cells = np.arange(count)
    picture = np.stack((np.zeros_like(cells), cells // columns, cells % columns)) + start
    positions[:, start : start + count] = picture
    return positions


def make_batch(
    rng: Random, language: Language, plan: tuple[int, SizeClass, int], pixels: np.ndarray
) -> Batch:
    """Render a batch for *plan* (pictures, size class, elements); its patches go to *pixels* [I, N, 588]."""
    num_images, size_class, max_elements = plan
    grids, turns = np.zeros((num_images, 2), np.int64), []
    for i in range(num_images):
        drawn = _training_scene(rng, size_class, max_elements)
        patches, *grids[i] = patchify(drawn.image)
        pixels[i, : len(patches)] = patches
        tokens = len(patches) // 4
        turns.append(language.turn(tokens, CAPTION_PROMPT.format(title=drawn.title), drawn.caption))
        turns.append(language.turn(tokens, drawn.question, drawn.answer))
    return _collate(language, turns, grids, pixels)


def _collate(
    language: Language, turns: list[tuple[list[int], int]], grids: np.ndarray, pixels: np.ndarray
) -> Batch:
    longest = max(len(ids) for ids, _ in turns)
    length = -(-max(longest, len(language.prefix) + pixels.shape[1] // 4) // 16) * 16
    input_ids = np.zeros((len(turns), length), np.int64)
    labels, weights = np.zeros_like(input_ids), np.zeros((len(turns), length), np.float32)
    for row, (ids, start) in enumerate(turns):
        input_ids[row, : len(ids)] = ids
        labels[row, start - 1 : len(ids) - 1] = ids[start:]
        # Answers have few tokens; at equal weight they would hardly count beside captions.
        weights[row, start - 1 : len(ids) - 1] = 1.0 if row % TURNS_PER_IMAGE == 0 else 2.0
    positions = [image_positions(int(h), int(w), len(language.prefix), length) for h, w in grids]
    lengths = np.array([len(ids) for ids, _ in turns])
    return Batch(pixels, grids, input_ids, labels, weights, np.stack(positions, axis=1), lengths)


class TrainingTower:
    """The vision tower of a model, run on padded instead of packed pictures; same weights, same features."""

    def __init__(self, visual: Any, device: torch.device) -> None:
        self.visual = visual
        self.device = device
        self._rows: dict[tuple[int, int], int] = {}
        self._tables = self._make_tables()

    def _make_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per patch of every possible grid: weights over the learned positions, and rotary angles."""
        mixes, angles, used = [], [], 0
        for rows, columns in product(range(2, 42, 2), range(2, 42, 2)):
            if rows * columns <= 4 * SIZE_CLASSES[-1].max_tokens:
                self._rows[rows, columns] = used
                row, column = _patch_coordinates(rows, columns)
                mixes.append(self._position_mix(row / rows, column / columns))
                angles.append(self._angles(row, column))
                used += rows * columns
        return torch.cat(mixes).to(self.device), torch.cat(angles).to(self.device)

    def _position_mix(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        count = self.visual.embeddings.num_positions
        side = int(count**0.5)
        grid = torch.stack((column, row), dim=-1)[None, :, None] * 2 - 1
        basis = torch.eye(count).view(1, count, side, side)
        mix = F.grid_sample(basis, grid, mode="bicubic", align_corners=False, padding_mode="border")
        return mix[0, :, :, 0].T

    def _angles(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        attention = self.visual.blocks[0].attn
        spatial = attention.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(0, spatial, 2) / spatial)
        both = torch.cat((row.floor()[:, None] * frequencies, column.floor()[:, None] * frequencies), dim=-1)
        return torch.cat((both, both), dim=-1)

    def patch_rows(self, grids: np.ndarray, num_patches: int) -> tuple[np.ndarray, np.ndarray]:
        """Per patch its row in the tables [I, N], and whether it is real, not padding [I, N]."""
        first = np.array([self._rows[int(h), int(w)] for h, w in grids])[:, None]
        real = np.arange(num_patches) < grids.prod(axis=1)[:, None]
        return np.where(real, first + np.arange(num_patches), 0), real

    def __call__(self, pixels: torch.Tensor, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Visual tokens [I, N / 4, D] of uint8 patches [I, N, 588]; those of padding mean nothing."""
        visual = self.visual
        mix, angles = self._tables
        mean = torch.tensor(IMAGE_MEAN, device=self.device).repeat_interleave(196) * 255
        std = torch.tensor(IMAGE_STD, device=self.device).repeat_interleave(196) * 255
        projection = visual.patch_embed.proj
        weight = projection.weight.sum(dim=2).flatten(1)
        x = visual.post_conv_layernorm(F.linear((pixels.float() - mean) / std, weight, projection.bias))
        x = x + F.embedding(rows, mix) @ visual.embeddings.position_embedding.weight
        turned = F.embedding(rows, angles)[:, None]
        rotary = (turned.cos(), turned.sin())
        for block in visual.blocks:
            x = x + self._attend(block.attn, block.norm1(x), rotary, real[:, None, None])
            x = x + block.mlp(block.norm2(x))
        x = visual.post_layernorm(x)
        x = x.view(len(x), x.shape[1] // 4, -1)
        down = visual.downsample
        weight = down.weight.permute(0, 2, 3, 1).flatten(1)
        merged: torch.Tensor = visual.merger(F.linear(x, weight, down.bias))
        return merged

    def _attend(
        self, attention: Any, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        heads, width = attention.num_heads, attention.head_dim
        q, k, v = attention.qkv(x).view(*x.shape[:2], 3, heads, width).permute(2, 0, 3, 1, 4)
        cos, sin = rotary
        q, k = ((t.float() * cos + _rotate_half(t.float()) * sin).to(v.dtype) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: torch.Tensor = attention.proj(out.transpose(1, 2).reshape(x.shape))
        return projected


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _patch_coordinates(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of the patches in patch units, in the order in which 2 x 2 of them are merged."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    ordered = grid.view(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2).reshape(-1, 2) + 0.5
    return ordered[:, 0], ordered[:, 1]


@dataclass(frozen=True, slots=True)
class Staged:
    """A batch as tensors, on the way to or on the training device."""

    pixels: torch.Tensor
    patch_rows: torch.Tensor
    real: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    answer_index: torch.Tensor  # flat positions in [R, L] whose next token is part of an answer
    answer_row: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> "Staged":
        """The same on *device*."""
        return Staged(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def stage(batch: Batch, tower: TrainingTower, pinned: bool) -> Staged:
    """Copy *batch* out of its shared memory, with all indices that the model needs."""
    rows, real = tower.patch_rows(batch.grids, batch.pixels.shape[1])
    answer_index = np.flatnonzero(batch.weights)
    arrays = (
        batch.pixels,
        rows,
        real,
        batch.input_ids,
        np.repeat(batch.positions, TURNS_PER_IMAGE, axis=1),
        answer_index,
        answer_index // batch.input_ids.shape[1],
        batch.labels.reshape(-1)[answer_index],
        batch.weights.reshape(-1)[answer_index],
    )
    tensors = (torch.from_numpy(array) for array in arrays)
    return Staged(*(t.pin_memory() if pinned else t.clone() for t in tensors))


def answer_logits(model: Any, tower: TrainingTower, staged: Staged, image_id: int) -> torch.Tensor:
    """Logits at the answer positions of a batch, right-padded and without a mask: no answer sees padding."""
    features = tower(staged.pixels, staged.patch_rows, staged.real)
    embedded = model.get_input_embeddings()(staged.input_ids)
    length, start = staged.input_ids.shape[1], int(_PREFIX_TOKENS)
    placed = F.pad(features, (0, 0, start, length - start - features.shape[1]))
    placed = placed[:, None].expand(-1, TURNS_PER_IMAGE, -1, -1).reshape(embedded.shape)
    embedded = torch.where((staged.input_ids == image_id)[..., None], placed.to(embedded.dtype), embedded)
    hidden = model.model.language_model(
        inputs_embeds=embedded, position_ids=staged.positions, attention_mask=None, use_cache=False
    ).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden.flatten(0, 1).index_select(0, staged.answer_index))
    return logits.float()


_PREFIX_TOKENS = 5  # [gMASK]<sop><|user|>\n<|begin_of_image|>


def check(folder: Path) -> None:
    """Compare the padded training path with the forward pass of transformers; raise where they differ."""
    device = torch.device("cpu")
    model, language = new_model(folder), Language.load(folder)
    assert len(language.prefix) == _PREFIX_TOKENS
    tower = TrainingTower(model.model.visual, device)
    for size_class in SIZE_CLASSES:
        pixels = np.zeros((4, size_class.max_patches, PATCH_VALUES), np.uint8)
        batch = make_batch(Random("check"), language, (4, size_class, 3), pixels)
        with torch.no_grad():
            ours = answer_logits(model, tower, stage(batch, tower, pinned=False), language.image_id)
            theirs = _reference_logits(model, batch, language.image_id)
        difference = (ours - theirs).abs().max().item()
        print(f"{size_class}: max |logit| {theirs.abs().max():.3f}, max difference {difference:.2e}")
        assert difference < 1e-4, "the training tower does not compute what transformers computes"


def _reference_logits(model: Any, batch: Batch, image_id: int) -> torch.Tensor:
    rows = [i for i in range(len(batch.grids)) for _ in range(TURNS_PER_IMAGE)]
    mean, std = (np.repeat(np.array(v, np.float32), 196) for v in (IMAGE_MEAN, IMAGE_STD))
    counts = batch.grids.prod(axis=1)
    patches = np.concatenate([batch.pixels[i, : counts[i]] for i in rows])
    values = torch.from_numpy((patches / np.float32(255) - mean) / std).view(-1, 3, 1, 196)
    input_ids = torch.from_numpy(batch.input_ids)
    output = model(
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < torch.from_numpy(batch.lengths)[:, None],
        pixel_values=values.expand(-1, -1, 2, -1).reshape(len(values), -1),
        image_grid_thw=torch.tensor([[1, *batch.grids[i]] for i in rows]),
        mm_token_type_ids=(input_ids == image_id).int(),
    )
    logits: torch.Tensor = output.logits.flatten(0, 1)[np.flatnonzero(batch.weights)]
    return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How long and how hard to train."""

    out: Path
    minutes: float
    workers: int
    patches_per_batch: int
    learning_rate: float
    seed: int
    scenes: Path
    resume: bool


class Renderers:
    """Processes that render batches without end, handing them over in memory shared with this process."""

    SLOTS_PER_WORKER = 2

    def __init__(self, settings: TrainingSettings, language: Language) -> None:
        self.settings = settings
        self.language = language
        context = multiprocessing.get_context("fork")
        self.progress = context.Value("d", 0.0)
        self._ready: Any = context.SimpleQueue()
        self._free: Any = context.SimpleQueue()
        # Anonymous shared mappings: neither /dev/shm, often 64 MB in containers, nor pickling is in the way.
        slot_bytes = settings.patches_per_batch * PATCH_VALUES
        self._slots = [mmap.mmap(-1, slot_bytes) for _ in range(self.SLOTS_PER_WORKER * settings.workers)]
        for slot in range(len(self._slots)):
            self._free.put(slot)
        self._processes = [
            context.Process(target=self._render, args=(worker,), daemon=True)
            for worker in range(settings.workers)
        ]
        for process in self._processes:
            process.start()

    def _view(self, slot: int, num_images: int, size_class: SizeClass) -> np.ndarray:
        values = num_images * size_class.max_patches * PATCH_VALUES
        flat = np.frombuffer(self._slots[slot], dtype=np.uint8, count=values)
        return flat.reshape(num_images, size_class.max_patches, PATCH_VALUES)

    def _render(self, worker: int) -> None:
        rng = Random(f"train/{self.settings.seed}/{worker}/{self.settings.resume}")
        while True:
            size_class = rng.choices(SIZE_CLASSES, [c.weight for c in SIZE_CLASSES])[0]
            num_images = self.settings.patches_per_batch // size_class.max_patches
            slot = self._free.get()
            pixels = self._view(slot, num_images, size_class)
            plan = (num_images, size_class, self._max_elements(rng))
            batch = make_batch(rng, self.language, plan, pixels)
            # The pixels stay in the slot; only the small arrays travel through the queue.
            self._ready.put((slot, size_class, replace(batch, pixels=None)))

    def _max_elements(self, rng: Random) -> int:
        return 3 if self.settings.resume else _curriculum(rng, self.progress.value)

    def batches(self, tower: TrainingTower, pinned: bool) -> Iterator[Staged]:
        """Yield batches; each frees its slot as soon as it is copied."""
        while True:
            slot, size_class, batch = self._ready.get()
            pixels = self._view(slot, len(batch.grids), size_class)
            staged = stage(replace(batch, pixels=pixels), tower, pinned)
            self._free.put(slot)
            yield staged

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()


def _curriculum(rng: Random, progress: float) -> int:
    """Elements per picture at most: few at first."""
    if progress < 0.06:
        return 1
    if progress < 0.12:
        return rng.choice((1, 2))
    return rng.choice((2, 3)) if progress < 0.2 else 3


def prefetch(items: Iterator[Staged], depth: int) -> Iterator[Staged]:
    """Draw *items* in a thread, so that copying overlaps with the device's work."""
    ready: queue.Queue[Staged] = queue.Queue(depth)

    def fill() -> None:
        for item in items:
            ready.put(item)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield ready.get()


class Trainer:
    """Owns the weights while they are trained, and the clock that drives the learning rate."""

    WARMUP_STEPS = 200

    def __init__(self, settings: TrainingSettings, model: Any, device: torch.device, image_id: int) -> None:
        self.settings = settings
        self.model = model.to(device).train()
        self.device = device
        self.image_id = image_id
        self.tower = TrainingTower(model.model.visual, device)
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        kept = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device.type == "cuda")
        self.started = time.monotonic()
        self.step = 0
        self.samples = 0

    @property
    def progress(self) -> float:
        """Fraction of the training time that has passed."""
        return min(1.0, (time.monotonic() - self.started) / (60 * self.settings.minutes))

    def _set_learning_rate(self) -> float:
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress))
        rate = self.settings.learning_rate * decay * min(1.0, (self.step + 1) / self.WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def train_on(self, staged: Staged) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; the loss, and per answer position whether the model was right."""
        self._set_learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = answer_logits(self.model, self.tower, staged, self.image_id)
        losses = F.cross_entropy(logits, staged.labels, reduction="none")
        loss = (losses * staged.weights).sum() / staged.weights.sum()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.samples += len(staged.input_ids)
        return loss.detach(), logits.detach().argmax(dim=-1) == staged.labels

    def report(self, loss: torch.Tensor, right: torch.Tensor, staged: Staged) -> None:
        """Print how well the last batch, unseen until then, was answered with teacher forcing."""
        wrong = torch.zeros(len(staged.input_ids), device=self.device)
        wrong.index_add_(0, staged.answer_row, (~right).float())
        exact = (wrong == 0).float().view(-1, TURNS_PER_IMAGE).mean(dim=0).tolist()
        seconds = time.monotonic() - self.started
        print(
            f"{seconds:6.1f} s  step {self.step:5d}  loss {loss.item():.4f}  caption {exact[0]:.3f}  "
            f"answer {exact[1]:.3f}  {self.samples / seconds:.0f} samples/s  "
            f"lr {self.optimizer.param_groups[0]['lr']:.2e}"
        )


def train(settings: TrainingSettings) -> None:
    """Train until the time is over, save, and evaluate on the held-out records."""
    language = Language.load(settings.out)
    renderers = Renderers(settings, language)  # forks, so it comes before anything touches the GPU
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = saved_model(settings.out) if settings.resume else new_model(settings.out)
    trainer = Trainer(settings, model, device, language.image_id)
    batches = prefetch(renderers.batches(trainer.tower, pinned=device.type == "cuda"), depth=3)
    reported = saved = trainer.started
    while trainer.progress < 1.0:
        staged = next(batches).to(device)
        loss, right = trainer.train_on(staged)
        renderers.progress.value = trainer.progress
        now = time.monotonic()
        if now - reported > 15 or trainer.step in (1, 20):
            trainer.report(loss, right, staged)
            reported = now
        if now - saved > 120:
            save_weights(trainer.model, settings.out)
            saved = now
    renderers.stop()
    save_weights(trainer.model, settings.out)
    evaluate(settings.out, settings.scenes, device)


def load_record_image(encoded: bytes) -> Image.Image:
    """The upright RGB picture of a record, laid over white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


@torch.inference_mode()
def generate_answers(
    model: Any, language: Language, turns: list[tuple[Image.Image, str]], device: torch.device
) -> list[str]:
    """Greedy answers to (picture, prompt) pairs, generated as one left-padded batch by transformers."""
    pad_id = language.tokenizer.token_to_id("<|endoftext|>")
    parts = [patchify(image) for image, _ in turns]
    prompts = [
        language.turn(len(patches) // 4, prompt, "")[0][:-1]
        for (patches, _, _), (_, prompt) in zip(parts, turns, strict=True)
    ]
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(prompt)) + prompt for prompt in prompts])
    mean, std = (torch.tensor(v).repeat_interleave(196) for v in (IMAGE_MEAN, IMAGE_STD))
    pixels = torch.from_numpy(np.concatenate([patches for patches, _, _ in parts]))
    values = ((pixels / 255 - mean) / std).view(-1, 3, 1, 196).expand(-1, -1, 2, -1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
        "mm_token_type_ids": (ids == language.image_id).int(),
        "pixel_values": values.reshape(len(pixels), -1),
        "image_grid_thw": torch.tensor([[1, rows, columns] for _, rows, columns in parts]),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return [_until_end(language, row) for row in output[:, length:].tolist()]


def _until_end(language: Language, ids: list[int]) -> str:
    if language.end_id in ids:
        ids = ids[: ids.index(language.end_id)]
    text: str = language.tokenizer.decode(ids)
    return text


def evaluate(folder: Path, scenes: Path, device: torch.device, batch_size: int = 64) -> None:
    """Print exact matches of greedy float32 generation on the held-out records, and some mistakes."""
    import pyarrow.parquet as pq
    from transformers import AutoModelForImageTextToText

    factory: Any = AutoModelForImageTextToText
    model = factory.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    language = Language.load(folder)
    outcomes: list[Outcome] = []
    for shard in sorted(scenes.glob("*.parquet")):
        records = pq.read_table(shard).to_pylist()
        for start in range(0, len(records), batch_size):
            part = records[start : start + batch_size]
            images = [load_record_image(record["image"]["bytes"]) for record in part]
            prompts = [CAPTION_PROMPT.format(title=record["title"]) for record in part]
            captions = generate_answers(model, language, list(zip(images, prompts, strict=True)), device)
            questions = [(image, record["question"]) for image, record in zip(images, part, strict=True)]
            answers = generate_answers(model, language, questions, device)
            outcomes += map(Outcome, part, images, captions, answers)
    _print_outcomes(outcomes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A held-out record beside what the model wrote about it."""

    record: dict[str, Any]
    image: Image.Image
    caption: str
    answer: str

    @property
    def groups(self) -> Iterator[str]:
        """The groups by which results are broken down."""
        caption, side = self.record["caption"], min(self.image.size)
        shapes = sum(caption.count(f" {shape}") for shape in SHAPES)
        yield "all"
        yield "sign" if "sign reads" in caption else "no sign"
        yield f"{shapes} shapes"
        yield f"short side {'below 112' if side < 112 else 'below 200' if side < 200 else '200 and more'}"
        yield f"{Path(self.record['image']['path']).suffix} file"
        yield "question: " + " ".join(self.record["question"].split()[:2])


def _print_outcomes(outcomes: list[Outcome]) -> None:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for group in outcome.groups:
            groups.setdefault(group, []).append(outcome)
    for group, members in sorted(groups.items()):
        captions = sum(o.caption == o.record["caption"] for o in members)
        answers = sum(o.answer == o.record["answer"] for o in members)
        n = len(members)
        print(f"{group:28s} {n:4d} records  captions {captions / n:7.2%}  answers {answers / n:7.2%}")
    mistakes = [(o.caption, o.record["caption"], o.record) for o in outcomes]
    mistakes += [(o.answer, o.record["answer"], o.record) for o in outcomes]
    for written, expected, record in [m for m in mistakes if m[0] != m[1]][:40]:
        print(f"{record['image']['path']} {record['question']!r}: wrote {written!r}, expected {expected!r}")


def _copy_checkpoint(folder: Path) -> None:
    # Only what training and evaluation read: the folder may be one from which few files come back.
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            shutil.copyfile(CHECKPOINT / name, folder / name)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the bundled tiny GLM-4V checkpoint.")
    parser.add_argument("command", choices=("init", "check", "train", "evaluate"))
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--patches-per-batch", type=int, default=65536)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=Path, default=HERE / "scenes")
    parser.add_argument("--resume", action="store_true", help="train the weights that are there further")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = vars(_parse_arguments())
    match options.pop("command"):
        case "init":
            write_files(options["out"])
            save_weights(new_model(options["out"]), options["out"])
        case "check":
            check(options["out"])
        case "evaluate":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            evaluate(options["out"], options["scenes"], device)
        case _:
            _copy_checkpoint(options["out"])
            train(TrainingSettings(**options))


if __name__ == "__main__":
    main()
