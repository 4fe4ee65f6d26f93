"""Every configuration key with its type, default, limits and meaning, as the page docs/configuration.md:

    python -m treepo.config.reference docs/configuration.md

The schemas say everything that is in it. A section that another command shares is described once.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from treepo.config.base import Section
from treepo.config.evaluate import EvalConfig
from treepo.config.rollout import RolloutConfig
from treepo.config.run import RunConfig
from treepo.learning.advantage import ESTIMATORS
from treepo.rewards.terms import TERMS

COMMANDS: dict[str, type[Section]] = {"train": RunConfig, "rollout": RolloutConfig, "eval": EvalConfig}

# Keys whose names are registered elsewhere, and may be more than these in a fork.
_REGISTERED = {("LearningConfig", "estimator"): ESTIMATORS, ("RewardConfig", "terms"): TERMS}

_TYPES = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "null": "null",
    "object": "names and values",
}

_HEAD = """\
# Configuration reference

Made from the schemas in `treepo/config/` by `python -m treepo.config.reference docs/configuration.md`.

One YAML file configures a command: `treepo train FILE`, `treepo rollout FILE`, `treepo eval FILE`; `launch`
and `plan` take the file of `train`. Any key
can be overridden behind it by its dotted name: `treepo train FILE sampling.width=8`. The value is read as
YAML, and the last of several wins.

- `extends: other.yaml`, a path relative to the file that says it, builds on another file: sections are merged
  key by key, everything else, lists and an empty `{}` included, replaces what the other file says. That file
  may extend a third one. `examples/paper/ablations/` has overlays of a few lines.
- An unknown key, a wrong type and a combination that cannot work are errors, each one line with its file,
  line and key and what is allowed; nothing starts before they are mended.
- Words such as `off` and `no` are text; truth is `true` and `false`. `1e-6` is a number.
- All other paths are relative to the working directory. Every run writes its effective configuration, without
  `extends`, to `config.yaml` in its folder.
"""

_TABLE = "| Key | Value | Default | Meaning |\n| --- | --- | --- | --- |"


def render() -> str:
    """The page in Markdown."""
    places = {command: list(_walk(schema, command)) for command, schema in COMMANDS.items()}
    headings: dict[type[BaseModel], str] = {}
    for section, heading in chain.from_iterable(places.values()):
        headings.setdefault(section, heading)
    parts = [_HEAD]
    for command, sections in places.items():
        parts.append(f"## treepo {command}\n")
        parts += [_part(section, headings) for section, heading in sections if headings[section] == heading]
    return "\n".join(parts)


def _walk(section: type[BaseModel], command: str, name: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """`section` and those in it, each with the heading that it would have here."""
    yield section, f"{command}: {name or 'top level'}"
    for key, field in section.model_fields.items():
        inner = _inner(field.annotation)
        if inner is not None:
            yield from _walk(inner, command, f"{name}.{key}".lstrip("."))


def _part(section: type[BaseModel], headings: Mapping[type[BaseModel], str]) -> str:
    """A section's heading, introduction and table."""
    lines = [f"### {headings[section]}\n"]
    if section.__dict__.get("__doc__"):
        lines.append(_one_line(section.__dict__["__doc__"]) + "\n")
    base = next((parent for parent in section.__mro__[1:] if parent in headings), None)
    if base:
        link = f"[{headings[base]}](#{_anchor(headings[base])})"
        lines.append(f"The keys of {link}, and these, which are new or have other defaults:\n")
    inherited = base.model_fields if base else {}
    keys = (
        key
        for key, field in section.model_fields.items()
        if not (key in inherited and _same(field, inherited[key]))
    )
    schemas = section.model_json_schema()["properties"]
    return "\n".join([*lines, _TABLE, *(_row(section, key, schemas[key], headings) for key in keys)]) + "\n"


def _row(
    section: type[BaseModel], key: str, schema: Mapping[str, Any], headings: Mapping[type[BaseModel], str]
) -> str:
    field = section.model_fields[key]
    inner = _inner(field.annotation)
    if inner is not None:
        value = f"[section](#{_anchor(headings[inner])})"
        value = f"list of {value}s" if schema.get("type") == "array" else value
        default = _departures(field.default)
    else:
        registered = _REGISTERED.get((section.__name__, key))
        value = _value(schema) + (f": {_words(sorted(registered))}" if registered else "")
        default = "" if field.is_required() else f"`{_default(schema['default'])}`"
    default = "required" if field.is_required() else default
    return f"| `{key}` | {value} | {default} | {_in_cell(_one_line(field.description or ''))} |"


def _default(value: Any) -> str:
    """As it would be written in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _departures(default: Any) -> str:
    """In what the default of a whole section is not that section's own."""
    if not isinstance(default, BaseModel):
        return ""
    return ", ".join(f"`{key}: {value}`" for key, value in default.model_dump(exclude_defaults=True).items())


def _value(schema: Mapping[str, Any]) -> str:
    """What may be written, in words."""
    if "enum" in schema:
        return _words(schema["enum"])
    if "anyOf" in schema:
        kinds = [kind.get("type") for kind in schema["anyOf"]]
        if kinds == ["integer", "string"]:
            return 'whole number from 1, or a range: `"2-8"`'
        return " or ".join(_value(kind) for kind in schema["anyOf"])
    if schema["type"] == "string":
        pattern = schema.get("pattern")
        return "path" if schema.get("format") == "path" else f"text like `{pattern}`" if pattern else "text"
    if schema["type"] == "array":
        return f"list of {schema['maxItems']}: {_value(schema['items'])}"
    if schema["type"] == "object":
        return f"names, each with a {_value(schema['additionalProperties'])}"
    return _TYPES[schema["type"]] + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f" {' and '.join(limits)}" if limits else ""


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, by itself or in a list."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _same(field: Any, inherited: Any) -> bool:
    return (field.annotation, field.default, field.metadata, field.description) == (
        inherited.annotation,
        inherited.default,
        inherited.metadata,
        inherited.description,
    )


def _anchor(heading: str) -> str:
    """As GitHub and MkDocs both make it of such headings."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _in_cell(text: str) -> str:
    """A `|` divides cells, and only outside code can it be written otherwise."""
    parts = text.split("`")
    assert not any("|" in code for code in parts[1::2]), text
    return "`".join(parts).replace("|", "&#124;")


def _words(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
