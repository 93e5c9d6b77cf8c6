"""Turns downloaded bytes into a training image: identified by content, checked before decoding, made RGB and square.

Checks run from cheap to expensive, so that a hostile image costs as little as possible: first bytes, header, pixel and
frame counts, then the pixels.
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

# The limit is checked below, on the header; Pillow's own check would raise in the middle of a format plug-in.
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
# Raised by Pillow's plug-ins on malformed bytes.
_DECODER_ERRORS = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError, OverflowError,
                   TypeError, AttributeError, ZeroDivisionError, RuntimeError, MemoryError)  # fmt: skip
_REUSED_BLOCKS = 2
"""Blocks of at most 16 MiB that Pillow reuses for the next image instead of allocating pages again."""
# EXIF orientation -> transposition that makes the stored image upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = tuple(_TRANSPOSITIONS[orientation] for orientation in (5, 6, 7, 8))
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOutcome:
    """A finished image, or the status of the failure.

    `width_px` and `height_px` are those of the source after EXIF orientation; `image` is the encoded result, and
    `perceptual_hash` is computed from its pixels before encoding.
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
    """Import everything that decoding needs, and limit this process to one core: other decoders run in parallel."""
    import torch

    import pipelines.download.resize  # noqa: F401

    torch.set_num_threads(1)
    Image.core.set_blocks_max(_REUSED_BLOCKS)


def sniff(body: bytes) -> ImageFormat | str | None:
    """Return the format by its first bytes, the name of a format that is not supported, or None if unknown."""
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
    """Return the training image made from a response body; a bad image is an outcome, never an exception."""
    try:
        return _decode(body, transform)
    except _Rejected as rejected:
        return DecodeOutcome(status=rejected.status, detail=rejected.detail)
    except _DECODER_ERRORS as error:
        return DecodeOutcome(status=FetchStatus.IMAGE_CORRUPT, detail=f"picture: {type(error).__name__}")


def _decode(body: bytes, transform: ImageTransform) -> DecodeOutcome:
    image_format = sniff(body)
    if image_format == "html":
        raise _Rejected(FetchStatus.HTML)
    if image_format is None:
        raise _Rejected(FetchStatus.NOT_AN_IMAGE, f"starts with {body[:8].hex()}")
    if not isinstance(image_format, ImageFormat) or image_format not in transform.formats:
        raise _Rejected(FetchStatus.FORMAT_NOT_ALLOWED, image_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plug-ins warn about odd metadata, which does not matter here
        with _open(body, image_format) as source:
            _check_header(source, transform)
            source_size = source.size
            if transform.jpeg_decoding == "scaled" and source.format == "JPEG":
                source.draft(None, (transform.size_px, transform.size_px))
            _load(source, image_format)
            width_px, height_px, square, notes = _finish(source, source_size, transform)
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=transform.jpeg_quality, subsampling=transform.jpeg_subsampling)
    return DecodeOutcome(
        status=FetchStatus.OK,
        detail=", ".join(notes),
        image=buffer.getvalue(),
        format=image_format.value,
        width_px=width_px,
        height_px=height_px,
        source_sha256=hashlib.sha256(body).hexdigest(),
        perceptual_hash=perceptual_hash(square),
    )


def _finish(
    image: Image.Image, source_size: tuple[int, int], transform: ImageTransform
) -> tuple[int, int, Image.Image, list[str]]:
    """Return the source's upright size, the finished image, and notes on metadata that was ignored.

    Orientation, profile and transparency are applied to the small image: on the large one they would cost more than
    everything else.
    """
    from pipelines.download.resize import resize_and_crop

    notes: list[str] = []
    profile = image.info.get("icc_profile")
    transposition = _orientation(image, notes)
    width_px, height_px = source_size if transposition not in _SWAPS_SIDES else source_size[::-1]
    square = resize_and_crop(_eight_bit(image), transform.size_px, transform.resample)
    if transposition is not None:
        square = square.transpose(transposition)
    return width_px, height_px, _over_white(square, profile, notes), notes


def _open(body: bytes, image_format: ImageFormat) -> Image.Image:
    try:
        return Image.open(io.BytesIO(body), formats=[_PILLOW_NAMES[image_format]])
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
    max_aspect = transform.max_source_aspect
    if max_aspect is not None and max(width, height) > max_aspect * min(width, height):
        raise _Rejected(FetchStatus.ASPECT_EXTREME, f"{width}x{height}")
    if transform.animation == "drop" and source.format != "MPO":
        try:
            animated = bool(getattr(source, "is_animated", False))
        except _DECODER_ERRORS as error:
            raise _corrupt(error, "frames") from error
        if animated:
            raise _Rejected(FetchStatus.ANIMATED)


def _load(source: Image.Image, image_format: ImageFormat) -> None:
    try:
        if image_format is not ImageFormat.JPEG:
            source.seek(0)
        source.load()
    except _DECODER_ERRORS as error:
        raise _corrupt(error, "pixels") from error


def _orientation(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODER_ERRORS:
        notes.append("exif ignored")
        return None


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the image in a mode that can be resized: L, RGB, RGBA or CMYK, 16 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8), "L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _over_white(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Return the image as sRGB, composited over white."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if alpha is not None else image
    if profile:
        colours = _to_srgb(colours, profile, notes)
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, (255, 255, 255))
    white.paste(colours, mask=alpha)
    return white


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Apply a colour profile. As in browsers, one that is broken or of another colour space is ignored, with a note."""
    try:
        return _srgb_transform(profile, image.mode).apply(image)
    except (ImageCms.PyCMSError, *_DECODER_ERRORS):
        notes.append("icc profile ignored")
        return image


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.ImageCmsTransform(source, _SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
