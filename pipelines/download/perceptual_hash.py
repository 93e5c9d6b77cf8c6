"""A 64-bit hash of what a picture shows: alike for the same picture in another size, quality or format.

pHash: the picture as 32 x 32 grey values, its 8 x 8 lowest DCT-II coefficients, one bit each for being above their
median. All of it in whole numbers, so that every machine gives the same bits.
"""

import numpy as np
from PIL import Image

_SIDE, _KEPT = 32, 8
_ONE = 1 << 14
_WEIGHTS = np.round(
    _ONE * np.cos(np.pi * np.arange(_KEPT)[:, None] * (2 * np.arange(_SIDE)[None, :] + 1) / (2 * _SIDE))
).astype(np.int64)


def perceptual_hash(picture: Image.Image) -> str:
    """Return the hash of a picture as 16 hex digits."""
    grey = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX))
    return f"{int(hash_grey(grey[None])[0]):016x}"


def hash_grey(grey: np.ndarray) -> np.ndarray:
    """Return the hashes, uint64 (N,), of grey pictures, uint8 (N, 32, 32).

    The first bit is the mean's; pictures of one colour have no other bit set.
    """
    coefficients = (_WEIGHTS @ grey.astype(np.int64) @ _WEIGHTS.T).reshape(len(grey), _KEPT * _KEPT)
    threshold = np.partition(coefficients, _KEPT * _KEPT // 2 - 1, axis=1)[:, _KEPT * _KEPT // 2 - 1]
    bits = np.packbits(coefficients > threshold[:, None], axis=1)
    return bits.view(">u8").reshape(-1).astype(np.uint64)
