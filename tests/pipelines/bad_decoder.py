"""A decoder that dies or hangs on demand; a module of its own, because worker processes import it."""

import os

from pipelines.image_decode import DecodeOutcome, decode
from pipelines.stage_configs import ImageTransform


def decode_or_misbehave(body: bytes, transform: ImageTransform) -> DecodeOutcome:
    if body == b"die":
        os.abort()
    if body == b"hang":
        while True:  # busy, as a decoder in an endless loop is
            pass
    return decode(body, transform)
