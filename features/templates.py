"""What is put around a caption before the text encoder reads it, by version.

A version is never edited: new words get a new version. What stands for "no prompt" has two forms: `instruction` keeps
the template around an empty caption, as the released code of arXiv 2602.03510 does; `empty` leaves nothing at all, as
its paper says. They are the same where the template is the caption alone.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

PromptDropForm = Literal["empty", "instruction"]
_CAPTION_ALONE = "plain-1"

TEXT_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        # The released code of arXiv 2602.03510: instruction and caption glued without a separator, and without the
        # chat template; where a prompt is dropped, the instruction alone.
        "released-1": "Describe this image.{caption}",
        # The caption alone; the unconditional text is empty and becomes one start (or else end) token.
        "plain-1": "{caption}",
    }
)


def apply_template(version: str, caption: str) -> str:
    """Return the text the encoder reads for a caption; raises ValueError that lists the known versions."""
    if version not in TEXT_TEMPLATES:
        raise ValueError(f"text template {version!r} is unknown; known: {', '.join(sorted(TEXT_TEMPLATES))}")
    return TEXT_TEMPLATES[version].replace("{caption}", caption)


def unconditional_template(version: str, form: PromptDropForm) -> str:
    """Return the version of the template in which the empty caption stands for "no prompt"."""
    return version if form == "instruction" else _CAPTION_ALONE


def unconditional_text(version: str, form: PromptDropForm) -> str:
    """Return the text that stands for "no prompt" beside captions in this template."""
    return apply_template(unconditional_template(version, form), "")
