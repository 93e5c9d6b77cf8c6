"""Server behaviours of the small web: each with its weight and the outcome for a careful crawler.

The world's build stores every behaviour in a page; `demo.web` only executes it.
"""

import io
import struct
import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from pipelines.download.status import FetchStatus

OVERSIZED_BYTES = 24 << 20
BOMB_SIDE_PX = 16_000


class PageKind(StrEnum):
    """Kind of response; `body` sends `status` and the stored bytes."""

    BODY = "body"
    REDIRECT = "redirect"
    FAIL_THEN_BODY = "fail_then_body"
    """Of any `num_failures` + 1 consecutive requests exactly one succeeds."""
    STALL = "stall"
    DRIP = "drip"
    SLOW = "slow"
    DISCONNECT = "disconnect"
    SHORT_BODY = "short_body"
    OVERSIZED = "oversized"


@dataclass(frozen=True, kw_only=True)
class Page:
    """One URL of the small web."""

    kind: PageKind = PageKind.BODY
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    offset: int = 0
    num_bytes: int = 0
    """Position of the body in the world's pack of bodies."""
    num_failures: int = 0


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """A server behaviour: its weight per 1000 rows that pass the filters, and the outcome for a careful crawler."""

    weight: float
    outcome: FetchStatus = FetchStatus.OK


_S = FetchStatus
# The weights follow LAION's losses, but with fewer slow servers: each costs the demo a time-out.
BEHAVIOURS: MappingProxyType[str, Behaviour] = MappingProxyType(
    {
        "fine": Behaviour(weight=0.0),  # all remaining rows
        "not_found": Behaviour(weight=18, outcome=_S.HTTP_NOT_FOUND),
        "gone": Behaviour(weight=6, outcome=_S.HTTP_NOT_FOUND),
        "forbidden": Behaviour(weight=6, outcome=_S.HTTP_FORBIDDEN),
        "fails_once": Behaviour(weight=12),
        "fails_twice": Behaviour(weight=6),
        "server_error": Behaviour(weight=6, outcome=_S.HTTP_SERVER_ERROR),
        "throttled": Behaviour(weight=6),
        "stall": Behaviour(weight=3, outcome=_S.READ_TIMEOUT),
        "drip": Behaviour(weight=3, outcome=_S.TOTAL_TIMEOUT),
        "slow": Behaviour(weight=6),
        "disconnect": Behaviour(weight=3, outcome=_S.DISCONNECTED),
        "truncated": Behaviour(weight=9, outcome=_S.IMAGE_TRUNCATED),
        "short_body": Behaviour(weight=3, outcome=_S.BODY_INCOMPLETE),
        "empty_body": Behaviour(weight=3, outcome=_S.BODY_EMPTY),
        "html_as_image": Behaviour(weight=9, outcome=_S.HTML),
        "svg": Behaviour(weight=3, outcome=_S.FORMAT_NOT_ALLOWED),
        "wrong_type": Behaviour(weight=12),
        "redirect": Behaviour(weight=15),
        "redirect_chain": Behaviour(weight=6),
        "redirect_to_html": Behaviour(weight=3, outcome=_S.HTML),
        "redirect_loop": Behaviour(weight=3, outcome=_S.REDIRECT_LOOP),
        "redirect_endless": Behaviour(weight=3, outcome=_S.TOO_MANY_REDIRECTS),
        "redirect_private": Behaviour(weight=3, outcome=_S.BLOCKED_ADDRESS),
        "redirect_metadata": Behaviour(weight=3, outcome=_S.BLOCKED_ADDRESS),
        "redirect_scheme": Behaviour(weight=3, outcome=_S.BAD_REDIRECT),
        "private_address": Behaviour(weight=3, outcome=_S.BLOCKED_ADDRESS),
        "oversized": Behaviour(weight=3, outcome=_S.BODY_TOO_LARGE),
        "pixel_bomb": Behaviour(weight=3, outcome=_S.TOO_MANY_PIXELS),
        "tiny": Behaviour(weight=6, outcome=_S.TOO_SMALL),
        "extreme_aspect": Behaviour(weight=6, outcome=_S.ASPECT_EXTREME),
        "copy": Behaviour(weight=12),
        "noai": Behaviour(weight=6, outcome=_S.OPTED_OUT),
        "noimageai": Behaviour(weight=3, outcome=_S.OPTED_OUT),
        "noai_noimageai": Behaviour(weight=3, outcome=_S.OPTED_OUT),
        "noai_for_others": Behaviour(weight=3),
        "animated_gif": Behaviour(weight=3, outcome=_S.ANIMATED),
        "animated_webp": Behaviour(weight=3, outcome=_S.ANIMATED),
        "cmyk": Behaviour(weight=6),
        "palette": Behaviour(weight=6),
        "sixteen_bit": Behaviour(weight=3),
        "alpha": Behaviour(weight=6),
        "exif_rotated": Behaviour(weight=6),
    }
)

CONTENT_TYPES = MappingProxyType(
    {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "SVG": "image/svg+xml"}
)
SUFFIXES = MappingProxyType({"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "SVG": ".svg"})

ROBOT_HEADERS = MappingProxyType(
    {
        "noai": "noai",
        "noimageai": "noimageai",
        "noai_noimageai": "noai, noimageai",
        "noai_for_others": "somebodyelsesbot: noai, noimageai",
    }
)

HTML_PAGE = (
    "<!DOCTYPE html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1>"
    "<p>The page you are looking for has moved.</p></body></html>\n"
)


def encode(image: Image.Image, format_name: str, rng: np.random.Generator) -> bytes:
    """Return the image as an ordinary server would store it."""
    options: dict[str, Any] = {}
    if format_name == "JPEG":
        options = {"quality": int(rng.integers(72, 96)), "progressive": bool(rng.random() < 0.3)}
    elif format_name == "PNG":
        options = {"compress_level": 3}
    elif format_name == "WEBP":
        options = {"quality": int(rng.integers(75, 96)), "method": 1}
    return _saved(image, format_name, **options)


def encode_unusually(image: Image.Image, behaviour: str) -> tuple[bytes, str]:
    """Return bytes and format of an image in an encoding that careless decoders get wrong."""
    if behaviour == "cmyk":
        return _saved(image.convert("CMYK"), "JPEG", quality=92), "JPEG"
    if behaviour == "palette":
        return _saved(image.quantize(128), "PNG", compress_level=3), "PNG"
    if behaviour == "sixteen_bit":
        return sixteen_bit_png(np.asarray(image)), "PNG"
    if behaviour == "alpha":
        mask = Image.new("L", image.size, 255)
        mask.paste(0, (0, 0, image.width // 12, image.height // 12))
        image = image.copy()
        image.putalpha(mask)
        return _saved(image, "PNG", compress_level=3), "PNG"
    if behaviour == "exif_rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: rotate a quarter turn clockwise to view
        return _saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=92, exif=exif.tobytes()), "JPEG"
    raise ValueError(f"{behaviour!r} is not an unusual encoding")


def animation(image: Image.Image, format_name: str) -> bytes:
    """Return an animation of two frames: the image, and its mirror image."""
    small = image.resize((128, 128))
    frames = [small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return _saved(frames[0], format_name, save_all=True, append_images=frames[1:], duration=200, loop=0)


def pixel_bomb() -> bytes:
    """Return a PNG of a few kilobytes that decodes to 256 million pixels."""
    row = b"\x00" + bytes(BOMB_SIDE_PX // 8)
    compressor = zlib.compressobj(9)
    data = b"".join(compressor.compress(row * 1000) for _ in range(BOMB_SIDE_PX // 1000)) + compressor.flush()
    return _png(BOMB_SIDE_PX, BOMB_SIDE_PX, bit_depth=1, colour_type=0, data=data)


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """Return uint8 (H, W, 3) pixels as a PNG with 16 bits per channel, which Pillow can't write."""
    height, width, _ = pixels.shape
    wide = (pixels.astype(">u2") * 257).reshape(height, -1).view(np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), wide], axis=1)
    return _png(width, height, bit_depth=16, colour_type=2, data=zlib.compress(rows.tobytes(), 3))


def _png(width: int, height: int, *, bit_depth: int, colour_type: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _saved(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()
