import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.download.resize import resize_and_crop
from tests.pipelines.download.hostile_server import make_image

FILTERS = ["bilinear", "bicubic", "lanczos", "box"]
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], CHANNELS[mode]), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def largest_difference(found: Image.Image, expected: Image.Image) -> int:
    assert (found.mode, found.size) == (expected.mode, expected.size)
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max())


def by_pillow(image: Image.Image, size_px: int, resample: str) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size_px, size_px), Image.Resampling[resample.upper()])


@pytest.mark.parametrize(
    "size", [(64, 64), (80, 70), (70, 81), (250, 64), (16, 16), (1, 1), (500, 333), (3000, 50), (50, 3000)]
)
@pytest.mark.parametrize("resample", FILTERS)
def test_the_centre_square_is_resized_as_by_pillow(size: tuple[int, int], resample: str) -> None:
    for mode in ("L", "RGB", "CMYK"):
        image = noise(mode, size)
        assert largest_difference(resize_and_crop(image, 64, resample), by_pillow(image, 64, resample)) <= 2


@pytest.mark.parametrize("resample", FILTERS)
def test_colours_are_weighted_by_opacity(resample: str) -> None:
    image = Image.new("RGBA", (200, 200), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 90, 200))
    found = np.asarray(resize_and_crop(image, 64, resample))
    seen = found[found[..., 3] > 64]
    assert seen[:, 0].min() >= 250
    assert seen[:, 2].max() <= 5
    assert largest_difference(resize_and_crop(image, 64, resample), by_pillow(image, 64, resample)) <= 4


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_in_several_blocks_of_memory_gives_the_same_result(mode: str) -> None:
    square = noise("L", (2100, 2100)).convert(mode)
    wide = Image.new(mode, (8400, 2100))  # 17 MB and more: Pillow takes memory in pieces of 16 MiB
    wide.paste(square, (3150, 0))
    assert largest_difference(resize_and_crop(wide, 256, "bilinear"), resize_and_crop(square, 256, "bilinear")) == 0


@pytest.mark.parametrize("size", [(300, 280), (1000, 257), (500, 333), (3000, 300), (333, 1024)])
def test_the_square_is_that_of_resizing_first_and_cropping_then(size: tuple[int, int]) -> None:
    image = make_image(*size, seed=3)
    short = min(size)
    whole = image.resize((256 * size[0] // short, 256 * size[1] // short), Image.Resampling.BILINEAR)
    left, top = round((whole.width - 256) / 2), round((whole.height - 256) / 2)
    expected = np.asarray(whole.crop((left, top, left + 256, top + 256))).astype(int)
    difference = np.abs(np.asarray(resize_and_crop(image, 256, "bilinear")).astype(int) - expected).mean()
    moved = np.abs(expected[:, 1:] - expected[:, :-1]).mean()
    assert difference < 0.6 * moved  # both round the square's place to a whole pixel, of the source or of the result


def test_a_square_of_the_target_size_is_unchanged() -> None:
    image = noise("RGB", (256, 300))
    assert largest_difference(resize_and_crop(image, 256, "bicubic"), image.crop((0, 22, 256, 278))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bytes_do_not_depend_on_vector_instructions(capability: str) -> None:
    code = (
        "import sys; from tests.pipelines.download.test_resize import digest_of_all_filters as digest; print(digest())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == digest_of_all_filters()


def digest_of_all_filters() -> str:
    digest = hashlib.sha256()
    for resample in FILTERS:
        for mode in CHANNELS:
            digest.update(resize_and_crop(noise(mode, (500, 333)), 64, resample).tobytes())
    return digest.hexdigest()
