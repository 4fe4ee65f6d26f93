"""What a part of the page is: a tab, and the answers to the questions that its script asks.

A part is a function in `treepo.view.parts` that makes a `Part` of the sources, and files below `page/`:

    page/NAME.js     calls `view.part("NAME", show)`; `show(root, place)` fills the element `root`. It is
                     called each time the tab is opened; `place` is what the address has after `#NAME/`
    page/NAME.css    its rules, below `#NAME`, with the colours of page/page.css

The script asks with `await view.ask("NAME/QUESTION", {key: value})`, in a live page the server and in an
exported file the answers that were written into it. `view.make` builds elements, in which text from models,
data and folders is only ever text. A further script shares names with it as properties of `view`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from treepo.errors import DataError, shown

Query = Mapping[str, str]
"""The keys and values of a question."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tab of the page.

    files: its libraries, scripts and style sheets, such as "vendor/uPlot.min.css", in their order.
    answers: by question, functions that return what `json_text` writes. They run in any thread, several at
    once, and raise TreepoError. exported: the questions and queries that an exported file can answer.
    empty: whether the sources have nothing for it to show; the page opens another tab first then.
    """

    name: str
    title: str
    files: tuple[str, ...]
    answers: Mapping[str, Callable[[Query], object]]
    exported: Callable[[], Iterable[tuple[str, Query]]]
    empty: bool = False


def number(query: Query, key: str, limit: int) -> int:
    """The query's value of a key, an integer from 0 to below the limit. Raises DataError for any other."""
    text = query.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) < limit):
        raise DataError(f"{key}: should be an integer from 0 to {limit - 1}, found {shown(text)}")
    return int(text)


def json_text(value: object) -> str:
    """ASCII JSON in which an HTML parser sees no tag, comment or entity. It has no number that JSON lacks."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
