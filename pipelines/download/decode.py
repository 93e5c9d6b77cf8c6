"""Bytes from the web to one training picture: recognised by content, checked before it is decoded, made RGB and square.

The order of checks is from cheap to dear, so that a hostile picture costs as little as possible: first bytes, header,
pixel and frame counts, then the pixels.
"""

import hashlib
import io
import re
import struct
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from pipelines.download.config import ImageFormat, ImageTransform
from pipelines.download.perceptual_hash import perceptual_hash
from pipelines.download.status import FetchStatus

# The limit is checked below, on the header; Pillow's own would raise in the middle of a format plug-in.
Image.MAX_IMAGE_PIXELS = None

_PILLOW_NAMES = {ImageFormat.JPEG: "JPEG", ImageFormat.PNG: "PNG", ImageFormat.WEBP: "WEBP", ImageFormat.GIF: "GIF"}
_HTML = re.compile(
    rb"^(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|script|title|meta)\b", re.I | re.S
)
_ISO_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic"}
_OTHER_FORMATS = (
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"\x00\x00\x01\x00", "ico"),
    (b"8BPS", "psd"),
    (b"%PDF-", "pdf"),
    (b"\xff\x0a", "jxl"),
    (b"\x00\x00\x00\x0cJXL ", "jxl"),
    (b"\x00\x00\x00\x0cjP  ", "jp2"),
)
# What Pillow's plug-ins raise on bytes that lie about themselves.
_DECODER_ERRORS = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError, OverflowError,
                   TypeError, AttributeError, ZeroDivisionError, RuntimeError, MemoryError)  # fmt: skip
_KEPT_BLOCKS = 2
"""Pieces of at most 16 MiB that Pillow keeps for the next picture instead of taking pages from the system anew."""
# EXIF orientation -> what turns the stored picture into the one that is meant to be seen.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_ON_SIDE = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOutcome:
    """A finished picture, or the status that says why there is none.

    `width_px` and `height_px` are the source's as shown (after EXIF orientation); `image` is the encoded result, and
    `perceptual_hash` is of its pixels before they are encoded.
    """

    status: FetchStatus
    detail: str = ""
    image: bytes = b""
    format: str = ""
    width_px: int = 0
    height_px: int = 0
    source_sha256: str = ""
    perceptual_hash: str = ""


class _Rejected(Exception):
    def __init__(self, status: FetchStatus, detail: str = "") -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


def prepare_to_decode() -> None:
    """Load what the first picture would, and let this process decode on one core: others decode beside it."""
    import torch

    import pipelines.download.resize  # noqa: F401

    torch.set_num_threads(1)
    Image.core.set_blocks_max(_KEPT_BLOCKS)


def sniff(body: bytes) -> ImageFormat | str | None:
    """Return a picture's format by its first bytes, the name of a format that is never decoded, or None."""
    if body.startswith(b"\xff\xd8\xff"):
        return ImageFormat.JPEG
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return ImageFormat.PNG
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return ImageFormat.WEBP
    if body.startswith((b"GIF87a", b"GIF89a")):
        return ImageFormat.GIF
    head = body[:1024]
    if _HTML.match(head):
        return "html"
    if body[4:8] == b"ftyp":
        return _ISO_BRANDS.get(body[8:12], "mp4")
    if b"<svg" in head.lower():
        return "svg"
    return next((name for magic, name in _OTHER_FORMATS if body.startswith(magic)), None)


def decode(body: bytes, transform: ImageTransform) -> DecodeOutcome:
    """Return the training picture made from a response's body; a bad picture is an outcome, never an exception."""
    try:
        return _decode(body, transform)
    except _Rejected as rejected:
        return DecodeOutcome(status=rejected.status, detail=rejected.detail)
    except _DECODER_ERRORS as error:
        return DecodeOutcome(status=FetchStatus.IMAGE_CORRUPT, detail=f"picture: {type(error).__name__}")


def _decode(body: bytes, transform: ImageTransform) -> DecodeOutcome:
    found = sniff(body)
    if found == "html":
        raise _Rejected(FetchStatus.HTML)
    if found is None:
        raise _Rejected(FetchStatus.NOT_AN_IMAGE, f"starts with {body[:8].hex()}")
    if not isinstance(found, ImageFormat) or found not in transform.formats:
        raise _Rejected(FetchStatus.FORMAT_NOT_ALLOWED, found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plug-ins warn about odd metadata; what matters is checked here
        with _open(body, found) as source:
            _check_header(source, transform)
            source_size = source.size
            if transform.jpeg_decoding == "scaled" and source.format == "JPEG":
                source.draft(None, (transform.size_px, transform.size_px))
            _load(source, found)
            width_px, height_px, square, notes = _finish(source, source_size, transform)
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=transform.jpeg_quality, subsampling=transform.jpeg_subsampling)
    return DecodeOutcome(
        status=FetchStatus.OK,
        detail=", ".join(notes),
        image=buffer.getvalue(),
        format=found.value,
        width_px=width_px,
        height_px=height_px,
        source_sha256=hashlib.sha256(body).hexdigest(),
        perceptual_hash=perceptual_hash(square),
    )


def _finish(
    picture: Image.Image, source_size: tuple[int, int], transform: ImageTransform
) -> tuple[int, int, Image.Image, list[str]]:
    """Return the source's size as shown, the finished picture, and notes on metadata that was ignored.

    Orientation, profile and transparency are applied to the small picture: on the large one they cost more than all
    the rest.
    """
    from pipelines.download.resize import resize_and_crop

    notes: list[str] = []
    profile = picture.info.get("icc_profile")
    turn = _orientation(picture, notes)
    width_px, height_px = source_size if turn not in _TURNS_ON_SIDE else source_size[::-1]
    square = resize_and_crop(_eight_bit(picture), transform.size_px, transform.resample)
    if turn is not None:
        square = square.transpose(turn)
    return width_px, height_px, _over_white(square, profile, notes), notes


def _open(body: bytes, found: ImageFormat) -> Image.Image:
    try:
        return Image.open(io.BytesIO(body), formats=[_PILLOW_NAMES[found]])
    except (UnidentifiedImageError, *_DECODER_ERRORS) as error:
        raise _corrupt(error, "header") from error


def _corrupt(error: Exception, where: str) -> _Rejected:
    text = str(error).lower()
    if any(word in text for word in ("truncated", "unexpected end", "not enough data")):
        return _Rejected(FetchStatus.IMAGE_TRUNCATED, where)
    return _Rejected(FetchStatus.IMAGE_CORRUPT, f"{where}: {type(error).__name__}")


def _check_header(source: Image.Image, transform: ImageTransform) -> None:
    width, height = source.size
    if width * height > transform.max_source_pixels:
        raise _Rejected(FetchStatus.TOO_MANY_PIXELS, f"{width}x{height}")
    if min(width, height) < transform.min_source_side_px:
        raise _Rejected(FetchStatus.TOO_SMALL, f"{width}x{height}")
    most = transform.max_source_aspect
    if most is not None and max(width, height) > most * min(width, height):
        raise _Rejected(FetchStatus.ASPECT_EXTREME, f"{width}x{height}")
    if transform.animation == "drop" and source.format != "MPO":
        try:
            animated = bool(getattr(source, "is_animated", False))
        except _DECODER_ERRORS as error:
            raise _corrupt(error, "frames") from error
        if animated:
            raise _Rejected(FetchStatus.ANIMATED)


def _load(source: Image.Image, found: ImageFormat) -> None:
    try:
        if found is not ImageFormat.JPEG:
            source.seek(0)
        source.load()
    except _DECODER_ERRORS as error:
        raise _corrupt(error, "pixels") from error


def _orientation(picture: Image.Image, notes: list[str]) -> Image.Transpose | None:
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODER_ERRORS:
        notes.append("exif ignored")
        return None


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Return the picture in a mode that can be resized: L, RGB, RGBA or CMYK, 16 bits scaled to 8."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8), "L")
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    if picture.mode == "1":
        return picture.convert("L")
    return picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB")


def _over_white(picture: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Return the picture as sRGB, its transparency laid over white."""
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    colours = picture.convert("RGB") if alpha is not None else picture
    if profile:
        colours = _to_srgb(colours, profile, notes)
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, (255, 255, 255))
    white.paste(colours, mask=alpha)
    return white


def _to_srgb(picture: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Apply a colour profile. One that is broken or of another colour space is ignored, as browsers do, and noted."""
    try:
        return _srgb_transform(profile, picture.mode).apply(picture)
    except (ImageCms.PyCMSError, *_DECODER_ERRORS):
        notes.append("icc profile ignored")
        return picture


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.ImageCmsTransform(source, _SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
