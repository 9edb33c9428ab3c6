"""A GLM-4V model of transformers as the packed engine runs it: its modules and weights, in our order."""

# P patches, V visual tokens, T packed tokens, R rows, C channels, D hidden size

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glm4v_batch.engines.generate import normalise, ran_out_of_memory
from glm4v_batch.engines.packed_attention import (
    TEXT_ATTENTION,
    VISION_ATTENTION,
    InHand,
    Packing,
    has_kernel,
    register,
)
from glm4v_batch.engines.packed_graphs import RUNS_TO_RECORD, Graphs
from glm4v_batch.engines.packed_last_layer import is_known, run_last_layer
from glm4v_batch.engines.packed_positions import Positions
from glm4v_batch.engines.packed_vision import MOST_IMAGES, VisionCall, vision_call
from glm4v_batch.kv_pool import KVPool, make_pool
from glm4v_batch.packed_limits import call_sizes
from glm4v_batch.types import GridTHW

_log = logging.getLogger(__name__)
_MOST_COMPILED = 64


@dataclass(frozen=True, slots=True)
class _Stage:
    """What travels from layer to layer, on the device of the layers at hand."""

    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    packing: Packing

    def to(self, device: torch.device) -> "_Stage":
        cos, sin = self.rotary
        return _Stage(self.hidden.to(device), (cos.to(device), sin.to(device)), self.packing.to(device))


class PackedModel:
    """Calls the vision tower, the decoder's layers and the head of *model* on packed tokens.

    *table* is float32 [C, 256], what each byte of a pixel stands for. The layers may lie on several
    devices; nothing may be offloaded.
    """

    def __init__(self, model: PreTrainedModel, table: Tensor, temporal_patch_size: int) -> None:
        register()
        self.model = model
        self._visual = model.model.visual
        self._text = model.model.language_model
        self._head = model.lm_head
        self.text_config: Any = self._text.config
        self.layers: Sequence[Any] = self._text.layers[: self.text_config.num_hidden_layers]
        # The public way to set these would look for a package of flash attention.
        self._text.config._attn_implementation = TEXT_ATTENTION  # noqa: SLF001
        self._visual.config._attn_implementation = VISION_ATTENTION  # noqa: SLF001
        if len(set(self.layer_devices)) > 1 or getattr(model, "hf_device_map", {}):
            _take_hooks_off(self._text, self._head)
        self._visual.patch_embed.proj = _WholeKernel(self._visual.patch_embed.proj)
        self._visual.downsample = _WholeKernel(self._visual.downsample)
        if hasattr(self._visual, "embeddings"):
            self._visual.embeddings = Positions(self._visual.embeddings.position_embedding)
        self._temporal_patch_size = temporal_patch_size
        self._table = table.to(self.vision_device)
        self._features: Tensor | None = None
        self._vision_graphs: Graphs[VisionCall] | None = Graphs("images") if self.has_vision_graphs else None
        self._most_recorded = 0

    @property
    def device(self) -> torch.device:
        """Where tokens are embedded."""
        return _device_of(self._text.embed_tokens)

    @property
    def vision_device(self) -> torch.device:
        """Where images enter."""
        return _device_of(self._visual.patch_embed)

    @property
    def merge_size(self) -> int:
        """Patches along each side that become one visual token."""
        size: int = self._visual.spatial_merge_size
        return size

    @property
    def patch_values(self) -> int:
        """The bytes of a patch: channels × patch²."""
        config = self._visual.config
        return int(config.in_channels * config.patch_size**2)

    @property
    def layer_devices(self) -> list[torch.device]:
        """Where each layer of the decoder lies."""
        return [_device_of(layer) for layer in self.layers]

    @property
    def has_graphs(self) -> bool:
        """Whether a step runs without the host's help, so that CUDA can record it."""
        head_dim = self.layers[0].self_attn.head_dim
        is_whole = len({weight.device for weight in self.model.parameters()}) == 1
        is_plain = not hasattr(self.model, "hf_quantizer") and "moe" not in self.text_config.model_type
        return is_whole and is_plain and has_kernel(self.device, self.dtype, head_dim)

    @property
    def has_vision_graphs(self) -> bool:
        """Whether the vision tower runs without the host's help."""
        config = self._visual.config
        head_dim = config.hidden_size // config.num_heads
        return self.has_graphs and has_kernel(self.vision_device, self._visual.dtype, head_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations, keys and values."""
        dtype: torch.dtype = self._text.embed_tokens.weight.dtype
        return dtype

    def make_pool(self, num_tokens: int, num_scratch: int) -> KVPool:
        """An empty pool for this model's layers. Raises torch.OutOfMemoryError."""
        # glm4v's attention passes over a head_dim of the config; what it computes with is its own.
        head_dim = self.layers[0].self_attn.head_dim
        num_heads = self.text_config.num_key_value_heads
        return make_pool(self.layer_devices, num_heads, head_dim, self.dtype, num_tokens, num_scratch)

    def positions(
        self, input_ids: Tensor, image_token_id: int, grids: Sequence[GridTHW]
    ) -> tuple[Tensor, int]:
        """M-RoPE positions int64 [3, T] of one prompt, and what later tokens' positions are ahead by."""
        is_image = (input_ids == image_token_id)[None].int()
        grid_thw = torch.tensor(grids) if grids else None
        positions, delta = self.model.model.get_rope_index(input_ids[None], is_image, image_grid_thw=grid_thw)
        return positions[:, 0], int(delta)

    def encode(self, images: Sequence[Tensor], grids: Sequence[GridTHW]) -> list[Tensor]:
        """The features [V, D] of each of *images*: of each its uint8 patches [P, C × patch²]."""
        num_patches = sum(map(len, images))
        is_recorded = num_patches <= self._most_recorded and len(images) <= MOST_IMAGES
        graphs = self._vision_graphs if is_recorded else None
        device = self.vision_device
        call = vision_call(images, grids, self.merge_size, device, fills_up=graphs is not None)
        features = self._features_of(call) if graphs is None else graphs.run(self._kept_features_of, call)
        sizes = [len(image) // self.merge_size**2 for image in images]
        parts = torch.split(features[: sum(sizes)], sizes)
        # Copies: a part would keep all of the call's features for as long as its request waits.
        return [part.to(self.device, copy=True) for part in parts]

    def _features_of(self, call: VisionCall) -> Tensor:
        pixels = normalise(call.patches, self._table, self._temporal_patch_size)
        output = self._visual(
            pixels.to(self._visual.dtype),
            grid_thw=call.grids,
            # Given these, transformers has no reason to wait for the device.
            position_ids=call.positions,
            cu_seqlens=call.ends,
            max_seqlen=call.size,
        )
        features: Tensor = output.pooler_output
        return features

    def _kept_features_of(self, call: VisionCall) -> Tensor:
        """As `_features_of`, in one place for all graphs: what each gives it would hold for ever."""
        features = self._features_of(call)
        if self._features is None or len(self._features) < len(features):
            self._features = torch.empty_like(features)
        return self._features[: len(features)].copy_(features)

    @torch.inference_mode()
    def record_vision(self, most_patches: int) -> None:
        """Have all calls of up to *most_patches* as graphs; what they take together, the largest takes alone.

        A size that was recorded later would run once without its graph, in memory of its own.
        *most_patches* is one of the sizes that calls are filled up to. Without memory for that, images go
        without graphs.
        """
        if self._vision_graphs is None:
            return
        self._vision_graphs.forget()
        self._most_recorded = most_patches
        try:
            for size in call_sizes(most_patches):
                image = torch.zeros(size, self.patch_values, dtype=torch.uint8)
                for _ in range(RUNS_TO_RECORD):
                    self.encode([image], [(1, self.merge_size, size // self.merge_size)])
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            self._most_recorded = 0
            self.forget_graphs()
            _log.warning("CUDA graphs of images do not fit beside the model: these take a little longer.")

    def forget_graphs(self) -> None:
        """Give up the memory of the vision tower's graphs; they are recorded again as they come."""
        if self._vision_graphs is not None:
            self._vision_graphs.forget()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, D] of int64 *input_ids* [T]."""
        embeds: Tensor = self._text.embed_tokens(input_ids)
        return embeds

    def forward(
        self, embeds: Tensor, positions: Tensor, packing: Packing, last: Tensor, pool: KVPool
    ) -> Tensor:
        """Hidden states [R, D] after the last layer: of *embeds* [T, D] those at the int64 *last* [R].

        *positions* is int64 [3, T].
        """
        stage = _Stage(embeds[None], self._rotary(embeds, positions), packing)
        for layer, keys, values in zip(self.layers, pool.keys, pool.values, strict=True):
            if stage.hidden.device != keys.device:
                stage = stage.to(keys.device)
            with _given(layer.self_attn, keys, values, stage.packing) as in_hand:
                if layer is self.layers[-1]:
                    return self._ended(stage, in_hand, last.to(keys.device, non_blocking=True))
                hidden = layer(stage.hidden, position_embeddings=stage.rotary, attention_mask=None)
            stage = replace(stage, hidden=hidden)
        raise AssertionError("a decoder has layers")

    def _rotary(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [1, T, C] of int64 *positions* [3, T], where *embeds* [T, D] lie."""
        rotary = self._text.rotary_emb
        # Of the embeddings it takes the type; for transformers 5.17 all have to lie where it does.
        there = _device_of(rotary)
        cos, sin = rotary(embeds[:0].to(there), position_ids=positions[:, None].to(there, non_blocking=True))
        return cos.to(embeds.device), sin.to(embeds.device)

    def _ended(self, stage: _Stage, in_hand: InHand, last: Tensor) -> Tensor:
        """Hidden states [R, D] after the last layer of the tokens *last*."""
        layer = self.layers[-1]
        if is_known(layer.self_attn):
            return run_last_layer(layer, stage.hidden, stage.rotary, in_hand, last)[0]
        hidden: Tensor = layer(stage.hidden, position_embeddings=stage.rotary, attention_mask=None)
        return hidden[0, last]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, vocabulary] of *hidden* [R, D], where tokens are embedded."""
        normed = self._text.norm(hidden.to(_device_of(self._text.norm)))
        logits: Tensor = self._head(normed.to(_device_of(self._head)))
        return logits.to(self.device)

    def compile(self, backend: str = "inductor") -> None:
        """Have the layers and the blocks of the vision tower compiled at their first call."""
        # Each device, and sizes of other divisors, are compiled anew; beyond the limit nothing would be.
        torch._dynamo.config.recompile_limit = _MOST_COMPILED  # noqa: SLF001  the documented setting
        for module in (*self.layers, *self._visual.blocks):
            module.compile(dynamic=True, backend=backend)

    def end_compilers(self) -> None:
        """End the processes that compiled: they hold memory of the host, and new ones come where needed."""
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()


@contextmanager
def _given(attention: Any, keys: Tensor, values: Tensor, packing: Packing) -> Iterator[InHand]:
    """What *attention* works with, where it finds it, while it does."""
    in_hand: InHand | None = getattr(attention, "in_hand", None)
    if in_hand is None:
        in_hand = attention.in_hand = InHand(keys, values, packing)
    # Not another object: compiled code looks whether a module's attributes are what they were.
    in_hand.keys, in_hand.values, in_hand.packing = keys, values, packing
    try:
        yield in_hand
    finally:
        # What stayed there would keep a pool in memory that its owner has given up.
        del in_hand.keys, in_hand.values, in_hand.packing


class _WholeKernel(torch.nn.Module):
    """A convolution whose kernel covers all that there is: a product of matrices, several times as fast."""

    def __init__(self, convolution: torch.nn.Module) -> None:
        super().__init__()
        self.weight: Any = convolution.weight
        self.bias: Any = convolution.bias

    def forward(self, values: Tensor) -> Tensor:
        rows = values.flatten(1).to(self.weight.device)
        return torch.nn.functional.linear(rows, self.weight.flatten(1), self.bias)


def _device_of(module: torch.nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


def _take_hooks_off(*modules: torch.nn.Module) -> None:
    """Without accelerate's hooks, which copy for each module what this module moves once per device."""
    from accelerate.hooks import remove_hook_from_module

    for module in modules:
        remove_hook_from_module(module, recurse=True)
