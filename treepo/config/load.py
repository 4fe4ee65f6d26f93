"""Load a configuration from YAML and `a.b=c` overrides, or report one clear line for each mistake.

A file may build on others: `extends: other.yaml` or `extends: [one.yaml, other.yaml]`, paths relative to the
file that contains them. A later file's values go over those of an earlier one, and the file's own over all.
Sections are merged key by key; every other value, lists and an empty `{}` included, replaces the one before.

All other paths in a configuration are relative to the working directory.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from treepo.config.base import Section, section_in
from treepo.config.run import RunConfig
from treepo.config.yaml_text import read_mapping, read_value
from treepo.errors import ConfigError, shortened, shown

RENAMED_KEYS = {"actor": "trainer", "score_check": "log_prob_check"}
"""Old dotted keys, and their new names in the same section."""

REPLACED_KEYS = {
    "learning.importance_cap": "importance: {high: NUMBER} instead, or importance: {mode: none} for null",
}
"""Old dotted keys, and what is written instead in the same section."""

_PASSWORD = re.compile(r"://[^/\s]*@")  # of a URL, with its user
_MARKS = ("[key]", "[list]", "[path]")
"""What pydantic adds to a place: a mapping's key, and which form of a value was found."""
_MAX_FAULTS = 20  # that are spelled out
_MAX_EXTENDED = 32  # files that one file extends, directly or through others


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a training run's configuration; see `load_as`."""
    return load_as(RunConfig, path, overrides)


def load_as[Schema: Section](
    schema: type[Schema], path: Path | None, overrides: Sequence[str] = ()
) -> Schema:
    """Load `path` (None: an empty file) as a `schema`, and apply `overrides` ("a.b=c", c in YAML) in order.

    Raises ConfigError with one line for each mistake: file and line, dotted key, what is allowed.
    """
    values, places = ({}, {}) if path is None else _read(path)
    for override in overrides:
        _override(values, places, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        place = str(path or "command line")
        faults = error.errors()
        lines = [_explain(fault, schema, places, place) for fault in faults[:_MAX_FAULTS]]
        if len(faults) > _MAX_FAULTS:
            lines.append(f"{place}: {len(faults) - _MAX_FAULTS} more mistakes")
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: Section) -> str:
    """Write the effective configuration as YAML; loading it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(
    path: Path, said_in: str = "", above: Sequence[Path] = (), read: list[Path] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read `path` and the files that it extends: the values, and the place ("file:line") of each dotted key.

    said_in: the place that names `path`, if a file does. above: the files that led here. read: all that were
    read before.
    """
    values, places = read_mapping(path, said_in)
    if "extends" not in values:
        return values, places
    extended, said_in = values.pop("extends"), f"{places.pop('extends')}: extends: "
    above, read = [*above, _real(path)], [] if read is None else read
    merged: dict[str, Any] = {}
    merged_places: dict[str, str] = {}
    for name in _names(extended, said_in):
        other = path.parent / name
        read.append(other)
        if _real(other) in above:
            raise ConfigError(f"{said_in}{other} extends itself, {_circle(above, _real(other))}")
        if len(read) > _MAX_EXTENDED:
            raise ConfigError(f"{said_in}more than {_MAX_EXTENDED} files are extended in all")
        _lay(merged, merged_places, *_read(other, said_in, above, read))
    _lay(merged, merged_places, values, places)
    return merged, merged_places


def _names(extended: Any, said_in: str) -> Sequence[str]:
    """The paths in an `extends`: one, or a list of at least one."""
    names: list[str] = []
    for name in extended if isinstance(extended, list) and extended else [extended]:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{said_in}should be the path of a YAML file, or a list, found {shown(name)}")
        names.append(name)
    return names


def _lay(
    merged: dict[str, Any], places: dict[str, str], new: dict[str, Any], new_places: dict[str, str]
) -> None:
    """Lay `new` over `merged`, both with the places of their keys."""
    replaced = tuple(_merge(merged, new))
    for key in [key for key in places if f"{key}.".startswith(replaced)]:
        del places[key]
    places.update(new_places)


def _real(path: Path) -> Path:
    """The path without links. Path.resolve would raise RuntimeError for a link to itself."""
    return Path(os.path.realpath(path))


def _circle(above: Sequence[Path], repeated: Path) -> str:
    through = [file.name for file in above[above.index(repeated) + 1 :]]
    return f"by way of {', '.join(through)}" if through else "directly"


def _merge(values: dict[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lay `new` over `values` in place; yield each dotted key that it replaces as a whole, and a dot."""
    for key, value in new.items():
        dotted = f"{prefix}{key}."
        old = values.get(key)
        if value and isinstance(value, dict) and isinstance(old, dict):
            yield from _merge(old, value, dotted)
        else:
            values[key] = value
            yield dotted


def _override(values: dict[str, Any], places: dict[str, str], override: str) -> None:
    dotted, equals, text = override.partition("=")
    place = f"override {shown(override)}"
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"{place}: expected KEY=VALUE, for example sampling.width=8")
    *parents, last = dotted.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{place}: {parent} is {shown(child)}, not a section")
        values = child
    values[last] = _override_value(text, place)
    places[dotted] = place


def _override_value(text: str, place: str) -> Any:
    """Read `text` as YAML, except that text which YAML takes for a comment ("#### ") stays text."""
    value = read_value(text, place)
    return text if value is None and text.strip().lstrip("#") != text.strip() else value


def _explain(fault: Mapping[str, Any], schema: type[Section], places: dict[str, str], file: str) -> str:
    """One line for pydantic's `fault`: place, dotted key, what is wrong, what is allowed."""
    *above, last = map(str, fault["loc"] or ("",))
    location = [part for part in above if part not in _MARKS]
    if fault["type"] == "extra_forbidden" or (last and last not in _MARKS):  # the former is the user's key
        location.append(last)
    dotted = shortened(".".join(part or "''" for part in location))
    place = _place(location, places) or file
    if fault["type"] == "extra_forbidden":
        return f"{place}: {dotted}: unknown key; {_suggestion(schema, location)}"
    if fault["type"] == "missing":
        return f"{place}: {dotted}: required, but not given"
    if fault["type"] == "model_type":
        return f"{place}: {dotted}: should be a section (keys and values), found {shown(fault['input'])}"
    if fault["type"] == "path_type":
        hint = "" if fault["input"] is None else "; to mean text, put it in quotes"
        return f"{place}: {dotted}: should be a path, found {shown(fault['input'])}{hint}"
    message = shortened(fault["msg"].removeprefix("Value error, "), 400).replace(
        "Input should be", "should be"
    )
    if fault["type"] == "value_error":  # a rule of ours: its message shows the values
        return f"{place}: {dotted}: {message}" if dotted else f"{place}: {message}"
    found = _PASSWORD.sub("://...@", shown(fault["input"]))
    return f"{place}: {dotted}: {message}, found {found}"


def _suggestion(schema: type[Section], location: Sequence[str]) -> str:
    """What to write in place of the unknown key at `location`."""
    if replacement := REPLACED_KEYS.get(".".join(location)):
        return f"write {replacement}"
    allowed = _keys_of(schema, location[:-1])
    new = RENAMED_KEYS.get(".".join(location))
    if new in allowed:
        return f"it is now called {new!r}"
    near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
    if len(location) == 1:  # `extends` is no key of the schema: suggest it only for a near miss
        near = difflib.get_close_matches(location[-1], ["extends"], cutoff=0.8) or near
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"


def _place(location: Sequence[str], places: Mapping[str, str]) -> str | None:
    """The place of the key, else of a key below it (an override creates its parents), else of its section."""
    dotted = ".".join(location)
    if not dotted:
        return None
    below = (place for key, place in places.items() if key.startswith(f"{dotted}."))
    return places.get(dotted) or next(below, None) or _place(location[:-1], places)


def _keys_of(schema: type[Section], location: Sequence[str]) -> list[str]:
    """The keys allowed in the section of `schema` at `location`."""
    section: type[BaseModel] = schema
    names = iter(location)
    for name in names:
        if name.isdecimal():  # an item of a list: the list's own key has led to its section
            continue
        annotation = section.model_fields[name].annotation
        inner = section_in(annotation)
        assert inner is not None
        section = inner
        if get_origin(annotation) is dict:
            next(names, None)  # the item's own name
    return list(section.model_fields)
