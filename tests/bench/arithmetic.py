"""The arithmetic that one request of a dense GLM-4V takes, from the dimensions in its config.

A multiplication and an addition are two operations. Each weight counts two for a token. Attention counts
two for QKᵀ and two for its product with V, for each pair of tokens and each dimension of the heads, without
the pairs that a causal mask hides (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on
GPU Clusters", appendix; the mask as in Dao 2023, "FlashAttention-2"). Norms, softmax, rotary positions and
activations do not count. The request of W1 comes to 27.9 TFLOP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

H100_FLOP_PER_SECOND = 798e12
"""What a large bfloat16 matrix product was measured to reach on an H100 80GB HBM3."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Operations by the unit that they are spent on: a patch, a pair of patches, a visual token and so on."""

    patch: int
    patch_pair: int
    visual_token: int
    token: int
    token_pair: int
    logits: int

    def request(self, patches: int, prompt_tokens: int, new_tokens: int, merge_size: int = 2) -> int:
        """Operations for one image of *patches*, in a prompt of *prompt_tokens*, with *new_tokens* as answer.

        The first token of the answer comes out of the prompt, so that one step less decodes.
        """
        tokens = prompt_tokens + new_tokens - 1
        return (
            self.patch * patches
            + self.patch_pair * patches**2
            + self.visual_token * (patches // merge_size**2)
            + self.token * tokens
            + self.token_pair * (tokens * (tokens + 1) // 2)
            + self.logits * new_tokens
        )


def arithmetic_of(config: Mapping[str, Any]) -> Arithmetic:
    """The arithmetic of a checkpoint with this *config*, complete as `Glm4vConfig().to_dict()` is.

    The layers are those of transformers' modeling_glm4v.py: the vision tower's MLP is as wide as
    `out_hidden_size`, and the merger's as `intermediate_size`.
    """
    text, vision = config["text_config"], config["vision_config"]
    wide, width, out = text["hidden_size"], vision["hidden_size"], vision["out_hidden_size"]
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or wide // heads
    block = 4 * width**2 + 3 * width * out
    attention = 2 * wide * head * (heads + text["num_key_value_heads"])
    layer = attention + 3 * wide * text["intermediate_size"]
    pixels = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    merged = vision["spatial_merge_size"] ** 2 * width * out
    return Arithmetic(
        patch=2 * (pixels * width + vision["depth"] * block),
        patch_pair=4 * width * vision["depth"],
        visual_token=2 * (merged + out**2 + 3 * out * vision["intermediate_size"]),
        token=2 * text["num_hidden_layers"] * layer,
        token_pair=4 * heads * head * text["num_hidden_layers"],
        logits=2 * wide * text["vocab_size"],
    )
