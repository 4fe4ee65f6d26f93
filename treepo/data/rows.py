"""A row of a data file, and the interface of the files that have rows."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from treepo.errors import DataError

_DEEPEST = 64  # levels of a value, more than data have and fewer than Python can pickle or write


class BadRow(Exception):  # noqa: N818 (the user does not see it: it becomes a DataError or a count)
    """A row that cannot be used. reason: the few words under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class AbsentColumnError(DataError):
    """A file without a column that is asked for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. index: 0-based, blank lines not counted. place: for messages ("gsm8k.jsonl:17"), 1-based.

    content: the columns, or the error if the whole row is unusable. at: its place for `RowFile.read`.
    """

    index: int
    place: str
    content: Mapping[str, Any] | BadRow
    at: int

    def column(self, name: str) -> Any:
        """The value in a column; `a.b` is b inside column a. Raises BadRow.

        No text in it has half a surrogate pair, and it is not nested deeper than Python can write it.
        """
        if isinstance(self.content, BadRow):
            raise self.content
        value = self.content[name] if name in self.content else self._nested(name)
        check_value(value, name)
        return value

    def _nested(self, name: str) -> Any:
        value: Any = self.content
        above = ""
        for part in name.split("."):
            if not isinstance(value, Mapping):
                what = f"text, {show(value)}" if isinstance(value, str) else show(value)
                raise BadRow("no column", f"column {above!r} is {what}; {name!r} needs an object there")
            if part not in value:
                missing = f"column {above!r} has no {part!r}" if above else f"column {name!r} is absent"
                raise BadRow("no column", f"{missing}; there are: {names_of(value)}")
            value, above = value[part], f"{above}.{part}" if above else part
        return value


def show(value: object) -> str:
    """A value for a message: one line, cut to 60 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return "a value that is nested too deep"
    return text if len(text) <= 60 else f"{text[:57]}..."


def names_of(names: Iterable[object]) -> str:
    """Column names for a message: one line without half surrogate pairs, the first 20."""
    shown = [repr(str(name))[1:-1] for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def check_value(value: object, name: str) -> None:
    """Raise BadRow if a text in the value has half a surrogate pair, or if it is nested too deep."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _DEEPEST:
            raise BadRow("nested too deep", f"column {name!r} is nested more than {_DEEPEST} levels deep")
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise BadRow(
                    "not Unicode",
                    f"column {name!r} has half a surrogate pair, {one[error.start]!r}, in {show(one)}; "
                    "write the whole character",
                ) from error
        elif isinstance(one, Mapping):
            waiting += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list | tuple):
            waiting += [(inner, depth + 1) for inner in one]


def check_json(extra: Mapping[str, object], column: str | None) -> None:
    """Raise BadRow if `extra`, of a column, cannot be sent to a reward endpoint."""
    try:
        json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(
            "extra not JSON",
            f"column {column!r} does not fit into JSON, which reward.url needs: {error}",
        ) from error


class RowFile(Protocol):
    """A data file. Its methods raise DataError if it cannot be read or has changed since it was opened."""

    blank_lines: int
    """Blank lines that the last complete reading passed over."""

    def __iter__(self) -> Iterator[Row]:
        """Read all rows in order."""
        ...

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        """Read the rows with these (index, at), in this order."""
        ...


class Unchanged:
    """Notices that a file has changed: the places in it would be those of other rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._now()

    def _now(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        if not self._path.is_file() or self._now() != self._before:
            raise DataError(f"{self._path}: it has changed while it was in use; start again")
