"""Formulas for the site, without a script from elsewhere: a line `$$...$$` of LaTeX becomes MathML."""

import re
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What MkDocs calls for every page before it reads the Markdown."""
    return re.sub(
        r"^\$\$(.+)\$\$$",
        lambda match: f"<div>{convert(match[1], display='block')}</div>",
        markdown,
        flags=re.MULTILINE,
    )
