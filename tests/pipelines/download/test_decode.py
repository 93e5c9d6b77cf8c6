import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.download.config import ImageFormat, ImageTransform
from pipelines.download.decode import DecodeOutcome, decode, sniff
from pipelines.download.status import FetchStatus
from tests.pipelines.download.hostile_server import JPEG, PNG, encode, make_image

TRANSFORM = ImageTransform(jpeg_quality=100, jpeg_subsampling="4:4:4")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def decoded(body: bytes, transform: ImageTransform = TRANSFORM) -> np.ndarray:
    """Return the image made from `body` as (H, W, 3) integers."""
    outcome = decode(body, transform)
    assert outcome.status == FetchStatus.OK, outcome
    image = Image.open(io.BytesIO(outcome.image))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (transform.size_px, transform.size_px))
    return np.asarray(image).astype(int)


def halves(
    left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (400, 400)
) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return image


def assert_colour(pixels: np.ndarray, expected: tuple[int, ...], tolerance: int = 4) -> None:
    assert np.abs(pixels - np.array(expected)).max() <= tolerance, (pixels.reshape(-1, 3).mean(0), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_the_size_is_as_shown(orientation: int) -> None:
    upright = Image.new("RGB", (320, 480), BLUE)
    upright.paste(RED, (0, 0, 320, 240))
    upright.paste(GREEN, (0, 0, 160, 240))
    undo: dict[int, Callable[[Image.Image], Image.Image]] = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encode(undo[orientation](upright), "JPEG", quality=100, subsampling=0, exif=exif)
    outcome = decode(body, TRANSFORM)
    assert (outcome.width_px, outcome.height_px) == (320, 480)
    pixels = decoded(body)
    assert_colour(pixels[10:100, 10:110], GREEN)
    assert_colour(pixels[10:100, 146:246], RED)
    assert_colour(pixels[150:, :], BLUE)


def test_transparency_is_composited_over_white_without_dark_edges() -> None:
    for mode, clear, solid in (("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)), ("LA", (0, 0), (128, 255))):
        pixels = decoded(encode(halves(clear, solid, mode), "PNG"))
        assert_colour(pixels[:, :120], WHITE)
        assert_colour(pixels[:, 136:], (255, 0, 0) if mode == "RGBA" else (128, 128, 128))
        assert pixels[:, 120:136, 0].min() >= (240 if mode == "RGBA" else 118)


def test_transparent_palettes_are_composited_over_white() -> None:
    image = halves(GREEN, RED).quantize(4)
    index = image.getpixel((10, 10))
    pixels = decoded(encode(image, "PNG", transparency=index))
    assert_colour(pixels[:, :120], WHITE)
    assert_colour(pixels[:, 136:], RED)
    assert_colour(decoded(encode(image, "GIF"))[:, :120], GREEN, 8)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 400).astype(np.uint16)
    pixels = decoded(encode(Image.fromarray(np.tile(ramp, (400, 1))), "PNG"))
    assert_colour(pixels[:, 126:130], (128, 128, 128), 4)
    assert pixels[:, -1].min() > 250
    assert pixels[:, 0].max() < 5


def test_cmyk_and_bilevel_and_grey() -> None:
    cmyk = halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK")
    pixels = decoded(encode(cmyk, "JPEG", quality=100))
    assert_colour(pixels[:, :120], RED, 6)
    assert_colour(pixels[:, 136:], BLUE, 6)
    assert_colour(decoded(encode(halves((0,), (1,), "1"), "PNG"))[:, 136:], WHITE)
    assert_colour(decoded(encode(halves((50,), (200,), "L"), "JPEG"))[:, 136:], (200, 200, 200))


def _swapped_profile() -> bytes:
    """sRGB with the colorants of red and blue swapped: a profile with an obvious effect."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    places = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def test_profiles_are_applied_and_broken_ones_noted() -> None:
    image = halves(RED, BLUE)
    plain = encode(image, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert_colour(decoded(plain)[:, :120], RED)
    swapped = encode(image, "PNG", icc_profile=_swapped_profile())
    assert_colour(decoded(swapped)[:, :120], BLUE, 12)
    for profile in (b"nonsense", _swapped_profile()[:200]):
        broken = encode(image, "PNG", icc_profile=profile)
        assert decode(broken, TRANSFORM).detail == "icc profile ignored"
        assert_colour(decoded(broken)[:, :120], RED)


def test_animation_policy_and_multi_picture_files() -> None:
    frames = [make_image(64, 64, seed=seed) for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        body = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(body, TRANSFORM).status == FetchStatus.ANIMATED, kind
        assert decode(body, ImageTransform(animation="first_frame")).status == FetchStatus.OK, kind
    multi_picture = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode(multi_picture, TRANSFORM).status == FetchStatus.OK


def test_limits_hold_on_the_header_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.download.decode._load", lambda *_: pytest.fail("pixels were decoded"))
    body = encode(make_image(200, 100), "PNG")
    assert decode(body, ImageTransform(max_source_pixels=19_999)).status == FetchStatus.TOO_MANY_PIXELS
    assert decode(body, ImageTransform(min_source_side_px=101)).status == FetchStatus.TOO_SMALL
    assert decode(body, ImageTransform(max_source_aspect=1.9)).status == FetchStatus.ASPECT_EXTREME
    assert decode(body, ImageTransform(formats=(ImageFormat.JPEG,))).status == FetchStatus.FORMAT_NOT_ALLOWED


def test_the_same_bytes_give_the_same_image() -> None:
    assert decode(JPEG, TRANSFORM) == decode(JPEG, TRANSFORM)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", JPEG[:4], PNG[:8], b"GIF89a", b"RIFF\x00\x00\x00\x00WEBPVP8L"]))
def test_arbitrary_bytes_never_raise(body: bytes, start: bytes) -> None:
    assert decode(start + body, TRANSFORM).status != FetchStatus.OK
    sniff(start + body)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.data())
def test_flipped_bytes_never_raise(kind: str, data: st.DataObject) -> None:
    body = bytearray(encode(make_image(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] ^= data.draw(st.integers(1, 255))
    assert isinstance(decode(bytes(body), TRANSFORM), DecodeOutcome)


def test_a_png_with_a_false_chunk_length_is_an_outcome() -> None:
    chunk = struct.pack(">I", 2**31 - 1) + b"IDAT" + zlib.compress(b"") + b"\0\0\0\0"
    assert decode(PNG[:33] + chunk, TRANSFORM).status in (FetchStatus.IMAGE_TRUNCATED, FetchStatus.IMAGE_CORRUPT)


@pytest.mark.parametrize("size", [(1024, 768), (515, 777), (2060, 4100), (600, 400), (511, 900)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_differs_only_in_fine_detail(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encode(make_image(*size, seed=5), "JPEG", quality=95, exif=exif)
    scaled = TRANSFORM.model_copy(update={"jpeg_decoding": "scaled"})
    whole, quick = decode(body, TRANSFORM), decode(body, scaled)
    assert (quick.width_px, quick.height_px, quick.source_sha256) == (
        whole.width_px, whole.height_px, whole.source_sha256
    )  # fmt: skip
    assert (quick.width_px, quick.height_px) == (size if orientation == 1 else size[::-1])
    difference = np.abs(decoded(body) - decoded(body, scaled))
    assert difference.mean() < 1  # a shift by a pixel would be 3 and more
    # Below twice the size, the decoder has nothing to shrink.
    assert (quick.image == whole.image) == (min(size) < 2 * TRANSFORM.size_px)


def test_scaled_decoding_never_goes_below_the_size_and_does_not_affect_other_formats() -> None:
    scaled = TRANSFORM.model_copy(update={"jpeg_decoding": "scaled"})
    with_detail = Image.effect_noise((512, 512), 60).convert("RGB")
    kept = decoded(encode(with_detail, "JPEG", quality=95), scaled)
    assert kept.std() > 15  # an image shrunk to 128 px and enlarged again would have lost it
    body = encode(make_image(1024, 1024), "PNG")
    assert decode(body, scaled) == decode(body, TRANSFORM)
