"""The two benchmark workloads, so that every engine is measured on the same work.

Pixels are random uint8 noise, answers have exactly `new_tokens` tokens (EOS ignored), greedy. The
prompt is the chat template around one image and a question of 40 bytes.
"""

import numpy as np

Work = list[tuple[int, int, int]]
"""(width, height, new_tokens) of each request."""


def w1(count: int) -> Work:
    """Equal requests: 1024×768 pixels, resized to 1036×756 (999 visual tokens); 128 new tokens."""
    return [(1024, 768, 128)] * count


def w2(count: int, seed: int = 7) -> Work:
    """Photo-like requests.

    0.1 to 4.8 megapixels, log-normal around 0.8; aspect 1:2 to 2:1; 20 to 300 new tokens, log-normal
    around 100.
    """
    rng = np.random.default_rng(seed)
    megapixels = np.clip(rng.lognormal(np.log(0.8), 0.8, count), 0.1, 4.8)
    aspect = np.clip(np.exp(rng.normal(0, 0.3, count)), 0.5, 2.0)
    tokens = np.clip(rng.lognormal(np.log(100), 0.6, count), 20, 300).astype(int)
    width = np.sqrt(megapixels * 1e6 * aspect).astype(int)
    height = np.sqrt(megapixels * 1e6 / aspect).astype(int)
    return [(int(w), int(h), int(t)) for w, h, t in zip(width, height, tokens, strict=True)]
