"""Previews of finished outputs: markdown with thumbnails that carry their own bytes."""

import base64
import io
from collections.abc import Callable

from pipelines.runner.outputs import Inputs, StageOutput

Preview = Callable[[StageOutput, Inputs], str]
"""Returns markdown from an output and its inputs; small enough for a database."""
NUM_IMAGES = 8
"""Images in a preview."""
_THUMBNAIL_PX = 96


def thumbnail(image_bytes: bytes, alt: str) -> str:
    """Return an encoded image as a small markdown image with a data URI."""
    from PIL import Image

    with Image.open(io.BytesIO(image_bytes)) as image:
        small = image.convert("RGB")
        small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=80)
    safe = "".join(character for character in alt if character.isalnum() or character in " ,.-")
    return f"![{safe}](data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()})"


def table_cell(text: str | None) -> str:
    """Return a text that fits a cell of a markdown table."""
    return (text or "").replace("|", "/").replace("\n", " ")
