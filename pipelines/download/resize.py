"""Crops and resizes an image to a square.

Uses torch's filters, which are Pillow's with 16-bit weights: values differ by at most 2 of 255, and the filters are
four to six times as fast (`tests.benchmarks.download`). The result does not depend on the CPU's vector instructions.
"""

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional


def resize_and_crop(image: Image.Image, size_px: int, resample: str) -> Image.Image:
    """Crop the largest centred square and resize it to `size_px`.

    Cropping first makes an extreme aspect ratio no more expensive than a square. torchvision's ``Resize`` followed by
    ``CenterCrop`` aligns the same square to whole pixels of the result instead of the source.
    `image` is L, RGB, RGBA or CMYK; `resample` is a value of `ImageTransform.resample`.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    size = (size_px, size_px)
    if side == size_px:
        return image.crop(box)
    if resample == "box":  # not available in torch
        return image.resize(size, Image.Resampling.BOX, box=box)
    if image.mode == "RGBA":  # weight colours by their opacity
        return resize_and_crop(image.convert("RGBa"), size_px, resample).convert("RGBA")
    source = _pixels(image)[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
    resized = functional.interpolate(source, size, mode=resample, antialias=True).permute(0, 2, 3, 1)
    layout = "RGBX" if resized.shape[-1] > len(image.getbands()) else image.mode
    # The tensor goes first: Arrow releases its memory without the GIL, which Pillow's last reference to a mapped buffer
    # needs (Python 3.13 crashed).
    del source
    return Image.frombytes(image.mode, size, resized.numpy().tobytes(), "raw", layout)


def _pixels(image: Image.Image) -> torch.Tensor:
    """Return an image as uint8 (1, H, W, channels).

    An image in one block of memory is not copied: Pillow's own block is returned, in which RGB has a fourth channel.
    """
    shape = (1, image.height, image.width, -1)
    try:
        values = pa.array(image)
    except ValueError:  # more than 16 MiB, in several blocks
        return torch.from_numpy(np.array(image)).view(shape)
    return torch.from_dlpack(values.values if pa.types.is_fixed_size_list(values.type) else values).view(shape)
