"""Turn every line `$$...$$` of LaTeX into MathML, so that the site needs no script from another server."""

import re
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs on the Markdown of every page."""
    return re.sub(
        r"^\$\$(.+)\$\$$",
        lambda match: f"<div>{convert(match[1], display='block')}</div>",
        markdown,
        flags=re.MULTILINE,
    )
