"""Write docs/configuration.md: every configuration key with its type, default, limits and meaning.

    python -m treepo.config.reference docs/configuration.md

Everything on the page comes from the schemas. A section that several commands share is described once.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from treepo.config.base import Section, section_in
from treepo.config.evaluate import EvalConfig
from treepo.config.rollout import RolloutConfig
from treepo.config.run import RunConfig
from treepo.errors import one_line

COMMANDS: dict[str, type[Section]] = {"train": RunConfig, "rollout": RolloutConfig, "eval": EvalConfig}

_TYPES = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "null": "null",
}

_HEAD = """\
# Configuration reference

One YAML file configures a command: `treepo train FILE`, `treepo rollout FILE`, `treepo eval FILE`; `launch`
and `plan` take the file of `train`. Override any key after the file by its dotted name:
`treepo train FILE sampling.width=8`. The value is read as YAML; the last override of a key wins.

- `extends: other.yaml` builds on another file, which may extend a third; `extends: [one.yaml, two.yaml]` on
  several, where a later file goes over an earlier one. The paths are relative to the file that contains them.
  Sections are merged key by key; every other value, lists and an empty `{}` included, replaces the one
  before. `examples/paper/ablations/` has examples of a few lines; `examples/presets/` has ways of sampling to
  lay over your own file.
- An unknown key, a wrong type or a combination that cannot work is an error of one line: file, line, key, and
  what is allowed. Nothing starts until all of them are fixed.
- Words such as `off` and `no` are text; booleans are `true` and `false`. `1e-6` is a number.
- All other paths are relative to the working directory. Every run writes its effective configuration, without
  `extends`, to `config.yaml` in its folder.

This page is generated: `python -m treepo.config.reference docs/configuration.md`.
"""

_TABLE = "| Key | Value | Default | Meaning |\n| --- | --- | --- | --- |"


def render() -> str:
    """Render the page in Markdown."""
    places = {command: list(_walk(schema, command)) for command, schema in COMMANDS.items()}
    headings: dict[type[BaseModel], str] = {}
    for section, heading in sorted(chain.from_iterable(places.values()), key=_depth):
        headings.setdefault(section, heading)
    parts = [_HEAD]
    for command, sections in places.items():
        parts.append(f"## treepo {command}\n")
        parts += [_part(section, headings) for section, heading in sections if headings[section] == heading]
    return "\n".join(parts)


def _walk(section: type[BaseModel], command: str, name: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """`section` and the sections in it, each with the heading that it would have here."""
    yield section, f"{command}: {name or 'top level'}"
    for key, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not None:
            yield from _walk(inner, command, f"{name}.{key}".lstrip("."))


def _depth(place: tuple[type[BaseModel], str]) -> int:
    return place[1].count(".")


def _part(section: type[BaseModel], headings: Mapping[type[BaseModel], str]) -> str:
    """A section's heading, introduction and table."""
    lines = [f"### {headings[section]}\n"]
    if section.__dict__.get("__doc__"):
        lines.append(one_line(section.__dict__["__doc__"]) + "\n")
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
    inner = section_in(field.annotation)
    if inner is not None:
        value = _holding(schema, f"[section](#{_anchor(headings[inner])})")
        default = _departures(field.default)
    else:
        value = _value(schema)
        default = "" if field.is_required() else f"`{_default(schema['default'])}`"
    default = "required" if field.is_required() else default
    return f"| `{key}` | {value} | {default} | {_in_cell(one_line(field.description or ''))} |"


def _holding(schema: Mapping[str, Any], link: str) -> str:
    """What a key with a section holds: it, a list of such, such by name, or one of several forms."""
    if "oneOf" in schema:
        return " or ".join(_holding(form, link) for form in schema["oneOf"])
    if schema.get("type") == "array":
        return f"list of {link}s"
    if "additionalProperties" in schema:
        return f"names, each with a {link}"
    return _value(schema) if schema.get("format") == "path" else link


def _default(value: Any) -> str:
    """The value as one would write it in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _departures(default: Any) -> str:
    """The keys in which a whole section's default differs from the section's own defaults."""
    if not isinstance(default, BaseModel):
        return ""
    return ", ".join(f"`{key}: {value}`" for key, value in default.model_dump(exclude_defaults=True).items())


def _value(schema: Mapping[str, Any]) -> str:
    """The allowed values, in words."""
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
        count = f" of {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list{count}: {_value(schema['items'])}"
    if schema["type"] == "object" and "propertyNames" not in schema:
        return "names and values"
    if schema["type"] == "object":
        names = _words(schema["propertyNames"]["enum"])
        return f"names, each with a {_value(schema['additionalProperties'])}: {names}"
    return _TYPES[schema["type"]] + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f" {' and '.join(limits)}" if limits else ""


def _same(field: Any, inherited: Any) -> bool:
    return (field.annotation, field.default, field.metadata, field.description) == (
        inherited.annotation,
        inherited.default,
        inherited.metadata,
        inherited.description,
    )


def _anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs both make of the heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _in_cell(text: str) -> str:
    """Escape `|`, which divides cells; that is possible outside code only."""
    parts = text.split("`")
    assert not any("|" in code for code in parts[1::2]), text
    return "`".join(parts).replace("|", "&#124;")


def _words(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
