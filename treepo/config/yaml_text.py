"""Reads YAML into plain values, and notes the place of each key. Whatever the text is, a mistake is one line.

Aliases and merge keys are allowed. Limits on size and depth keep a hostile or damaged file from exhausting
time, memory or Python's stack.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from treepo.errors import ConfigError, shortened, shown

MAX_BYTES = 1 << 20
"""Most bytes of a configuration file. The longest example has 4 thousand."""
MAX_DEPTH = 32
"""Most levels of nested sections and lists. The schema has six."""
MAX_VALUES = 20_000
"""Most values of a file, those behind an alias counted at each use."""
_MAX_INTEGER_BITS = 4096
_MAX_DIGITS = 4300
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Safe YAML without the surprises of YAML 1.1: 1e-6 is a number, `off` is a word, and what it reads as a
    date, to base 60 (1:30) or to base 8 (010) is an error.

    Text that another program cannot take (NUL, half a surrogate pair) and values that do not exist
    (`!!int x`) are errors with a line.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and isinstance(node, yaml.ScalarNode):
            _check_number(node)
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            # Of a constructor for text that its tag does not allow.
            kind = node.tag.rpartition(":")[2]
            raise _mistake(node, f"{shown(node.value)} cannot be read as {kind}") from None
        if isinstance(value, str) and not _is_plain(value):
            raise _mistake(node, f"{shown(value)} has a character that no text may have")
        if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
            raise _mistake(node, f"a number of more than {_MAX_INTEGER_BITS} bits")
        return value

    def refuse_date(self, node: yaml.ScalarNode) -> None:
        raise _mistake(
            node, f"{node.value} is read as a date, which no key takes; to mean text, put it in quotes"
        )


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.refuse_date)


def read_mapping(path: Path, said_in: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file that is a mapping of keys: the values, and the place ("file:line") of each dotted key.

    said_in: the place that names `path`, if a file does. Raises ConfigError.
    """
    try:
        with path.open("rb") as file:  # a device may have no end
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{said_in}{shortened(str(path), 300)}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{said_in}{path}: more than {MAX_BYTES} bytes, so no configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{said_in}{path}:{line}: not UTF-8 text") from None
    node, values = _load(text, str(path))
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else type(values).__name__
        raise ConfigError(f"{path}: expected a mapping of keys, found {found}")
    places: dict[str, str] = {}
    _locate(node, "", path, places)
    return _unshared(values), places


def read_value(text: str, place: str) -> Any:
    """Read one value. Raises ConfigError with the place."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{place}: more than {MAX_BYTES} characters")
    return _load(text, place, with_line=False)[1]


def _load(text: str, place: str, *, with_line: bool = True) -> tuple[yaml.Node | None, Any]:
    try:
        _check_structure(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and with_line else ""
        raise ConfigError(
            f"{place}{line}: not YAML: {shortened(error.problem or error.context or '')}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = f":{text.count('\n', 0, error.position) + 1}" if with_line else ""
        raise ConfigError(
            f"{place}{line}: not YAML: the character {error.character:#06x} is not allowed"
        ) from None


def _check_structure(text: str) -> None:
    """Raise MarkedYAMLError for nesting and aliases that the loader could not follow to their end."""
    sizes: dict[str, int] = {}
    above: list[tuple[str | None, int]] = []  # of the open sections and lists: anchor, `values` before
    values = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in above):
                raise _mistake(event, f"*{event.anchor} is a part of itself")
            values += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                above.append((event.anchor, values - 1))
        if len(above) > MAX_DEPTH:
            raise _mistake(event, f"more than {MAX_DEPTH} levels of sections and lists")
        if values > MAX_VALUES:
            raise _mistake(event, f"more than {MAX_VALUES} values")


def _check_number(node: yaml.ScalarNode) -> None:
    """Raise MarkedYAMLError for a number that is not what its writer sees."""
    text = node.value
    if len(text) > _MAX_DIGITS:
        raise _mistake(node, f"a number of more than {_MAX_DIGITS} characters")
    base = 60 if ":" in text else 8 if re.fullmatch(r"[-+]?0[0-7_]+", text) else 10
    if base != 10:
        raise _mistake(
            node,
            f"{text} is read as a number to base {base}; write it to base 10, or to mean text, in quotes",
        )


def _mistake(at: yaml.Node | yaml.Event, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, at.start_mark)


def _is_plain(text: str) -> bool:
    """Whether other programs can take the text: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _unshared(value: Any) -> Any:
    """A copy in which no two places share a section or list, as aliases do: an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(below) for key, below in value.items()}
    return [_unshared(below) for below in value] if isinstance(value, list) else value


def _locate(node: yaml.MappingNode, prefix: str, path: Path, places: dict[str, str]) -> None:
    for key, value in node.value:
        dotted, place = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
        if dotted in places:
            raise ConfigError(f"{place}: {shortened(dotted)}: given twice, first at {places[dotted]}")
        places[dotted] = place
        _locate_below(value, dotted, path, places)


def _locate_below(value: yaml.Node, dotted: str, path: Path, places: dict[str, str]) -> None:
    if isinstance(value, yaml.MappingNode):
        _locate(value, f"{dotted}.", path, places)
    elif isinstance(value, yaml.SequenceNode):
        for index, item in enumerate(value.value):
            places[f"{dotted}.{index}"] = f"{path}:{item.start_mark.line + 1}"
            _locate_below(item, f"{dotted}.{index}", path, places)
