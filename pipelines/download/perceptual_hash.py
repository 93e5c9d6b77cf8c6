"""A 64-bit perceptual hash, similar for versions of an image in other sizes, qualities or formats.

pHash: reduce the image to 32 x 32 grey values, take the 8 x 8 lowest DCT-II coefficients, and set one bit for each that
is above their median. Integer arithmetic gives the same bits on every machine.
"""

import numpy as np
from PIL import Image

_SIDE, _LOWEST = 32, 8
_ONE = 1 << 14
_WEIGHTS = np.round(
    _ONE * np.cos(np.pi * np.arange(_LOWEST)[:, None] * (2 * np.arange(_SIDE)[None, :] + 1) / (2 * _SIDE))
).astype(np.int64)


def perceptual_hash(image: Image.Image) -> str:
    """Return the hash of an image as 16 hex digits."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX))
    return f"{int(hash_grey(grey[None])[0]):016x}"


def hash_grey(grey: np.ndarray) -> np.ndarray:
    """Return the hashes, uint64 (N,), of grey images, uint8 (N, 32, 32).

    The first bit is that of the mean; images of one colour have no other bit set.
    """
    coefficients = (_WEIGHTS @ grey.astype(np.int64) @ _WEIGHTS.T).reshape(len(grey), _LOWEST * _LOWEST)
    threshold = np.partition(coefficients, _LOWEST * _LOWEST // 2 - 1, axis=1)[:, _LOWEST * _LOWEST // 2 - 1]
    bits = np.packbits(coefficients > threshold[:, None], axis=1)
    return bits.view(">u8").reshape(-1).astype(np.uint64)
