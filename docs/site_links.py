"""For the docs site: a link to a folder or file of the repository becomes plain text, since the site has no such page."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page without its links out of docs/."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
