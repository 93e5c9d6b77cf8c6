"""The square of one size that a picture becomes.

By torch's filters, which are Pillow's with weights of 16 bits: values differ by at most 2 of 255, and the filters are
four to six times as fast (`tests.benchmarks.download`). The bytes are the same whatever vector instructions a CPU has.
"""

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional


def resize_and_crop(picture: Image.Image, size_px: int, resample: str) -> Image.Image:
    """Cut the largest square out of the centre and resize it to `size_px`.

    Cut first, so that an extreme aspect costs no more than a square picture; torchvision's ``Resize`` and
    ``CenterCrop`` put the same square at whole pixels of the result instead of the source.
    `picture` is L, RGB, RGBA or CMYK; `resample` a name of `ImageTransform.resample`, whose filters do not alias.
    """
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    size = (size_px, size_px)
    if side == size_px:
        return picture.crop(box)
    if resample == "box":  # the only one that torch lacks
        return picture.resize(size, Image.Resampling.BOX, box=box)
    if picture.mode == "RGBA":  # a colour counts as much as it is opaque
        return resize_and_crop(picture.convert("RGBa"), size_px, resample).convert("RGBA")
    source = _pixels(picture)[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
    resized = functional.interpolate(source, size, mode=resample, antialias=True).permute(0, 2, 3, 1)
    layout = "RGBX" if resized.shape[-1] > len(picture.getbands()) else picture.mode
    return Image.frombytes(picture.mode, size, resized.numpy().tobytes(), "raw", layout)


def _pixels(picture: Image.Image) -> torch.Tensor:
    """Return a picture as uint8 (1, H, W, channels).

    A picture in one piece of memory is not copied: Pillow's own is returned, in which RGB has a fourth channel.
    """
    shape = (1, picture.height, picture.width, -1)
    try:
        values = pa.array(picture)
    except ValueError:  # of more than 16 MiB
        return torch.from_numpy(np.array(picture)).view(shape)
    return torch.from_dlpack(values.values if pa.types.is_fixed_size_list(values.type) else values).view(shape)
