"""The decoder's last layer, for those tokens alone that a row's next token is chosen from.

Of all others it takes keys and values, one fiftieth of a layer's work.
"""

# T packed tokens, R rows, K key-value heads, C head_dim, D hidden size, P tokens of the pool

import sys
from typing import Any

from torch import Tensor

from glm4v_batch.engines.packed_attention import InHand, Packing, write

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def is_known(attention: Any) -> bool:
    """Whether *attention* makes its keys and values as here: of projections and rotary positions alone."""
    return {name for name, _ in attention.named_children()} == _PROJECTIONS


def run_last_layer(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], in_hand: InHand, last: Tensor
) -> Tensor:
    """What *layer* makes of the tokens *last*, int64 [R], of *hidden* [1, T, D]: [1, R, D].

    *rotary* is cosine and sine [1, T, C]. The keys and values of all T tokens are in the pool afterwards.
    """
    cos, sin = rotary
    write(*_keys_and_values(layer, hidden, rotary), in_hand)
    packing = in_hand.packing
    speakers = packing.speakers
    in_hand.packing = Packing(packing.writes[last], 0, packing.pieces, speakers, speakers)
    chosen: Tensor = layer(
        hidden[:, last], position_embeddings=(cos[:, last], sin[:, last]), attention_mask=None
    )
    return chosen


def _keys_and_values(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [T, K, C] of *hidden* [1, T, D], as the modules of *layer* make them."""
    attention = layer.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    normed = layer.input_layernorm(hidden)
    key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.k_proj, attention.v_proj)
    )
    # It rotates queries and keys at once, each by itself.
    _, key = rotate(key, key, *rotary)
    return key[0].transpose(0, 1), value[0].transpose(0, 1)
