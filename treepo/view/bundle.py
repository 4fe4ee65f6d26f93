"""Makes one file of the page: markup, styles, scripts and vendored libraries, and in an exported file the
answers.

The page's policy lets a browser run only the scripts and style sheets whose hashes it names. A live page may
also ask its own server, an exported one loads nothing at all.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from treepo.view.part import Part, json_text
from treepo.view.sources import Source

_FOLDER = files("treepo.view")


def live_page(sources: Sequence[Source], parts: Sequence[Part]) -> str:
    """The page that asks its server."""
    return _page(sources, parts, None)


def exported_page(sources: Sequence[Source], parts: Sequence[Part]) -> str:
    """The page that has all its answers. Raises TreepoError if a part cannot answer."""
    answers = [
        (f"{part.name}/{question}", query, part.answers[question](query))
        for part in parts
        for question, query in part.exported()
    ]
    return _page(sources, parts, answers)


def _page(sources: Sequence[Source], parts: Sequence[Part], answers: object) -> str:
    named = ["page/page.css", "page/page.js", *(name for part in parts for name in part.files)]
    styles = [_file(name) for name in named if name.endswith(".css")]
    scripts = [_script(name) for name in named if name.endswith(".js")]
    data = {
        "sources": [{"name": source.name, "path": str(source.folder)} for source in sources],
        "parts": [{"name": part.name, "title": part.title, "empty": part.empty} for part in parts],
        "answers": answers,
    }
    return Template(_file("page/page.html")).substitute(
        styles="\n".join(f"<style>{style}</style>" for style in styles),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
        style_hashes=" ".join(map(_hash, styles)),
        script_hashes=" ".join(map(_hash, scripts)),
        connect="'self'" if answers is None else "'none'",
        title=escape(", ".join(source.name for source in sources)),
        data=json_text(data),
    )


def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _script(name: str) -> str:
    """A library as it is; ours as the body of a function, so that scripts share nothing but `view`."""
    text = _file(name)
    return text if name.startswith("vendor/") else f"(() => {{\n{text}}})();"


def _hash(text: str) -> str:
    """A source of a content-security policy: the script or style sheet with exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
