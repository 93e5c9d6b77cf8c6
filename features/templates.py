"""Templates around a caption for the text encoder, by version.

A version is never edited: new wording gets a new version. The unconditional text has two forms: `instruction` is the
template around an empty caption, as in the released code of arXiv 2602.03510; `empty` is no text at all, as in its
paper. They are equal where the template is the caption alone.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

PromptDropForm = Literal["empty", "instruction"]
_CAPTION_ALONE = "plain-1"

TEXT_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        # The released code of arXiv 2602.03510: instruction and caption joined without a separator, no chat template;
        # a dropped prompt leaves the instruction.
        "released-1": "Describe this image.{caption}",
        # The caption alone; the unconditional text is empty and becomes one start (or else end) token.
        "plain-1": "{caption}",
    }
)


def apply_template(version: str, caption: str) -> str:
    """Return the encoder's text for a caption; raises ValueError that lists the known versions."""
    if version not in TEXT_TEMPLATES:
        raise ValueError(f"text template {version!r} is unknown; known: {', '.join(sorted(TEXT_TEMPLATES))}")
    return TEXT_TEMPLATES[version].replace("{caption}", caption)


def unconditional_template(version: str, form: PromptDropForm) -> str:
    """Return the version of the template in which the empty caption gives the unconditional text."""
    return version if form == "instruction" else _CAPTION_ALONE


def unconditional_text(version: str, form: PromptDropForm) -> str:
    """Return the unconditional text that goes with captions in this template."""
    return apply_template(unconditional_template(version, form), "")
