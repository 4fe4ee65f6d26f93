"""Rows of a JSON lines or parquet file, read in order or by place.

A file may be larger than memory. Reading in order holds one row (JSON lines) or one batch of rows (parquet).
Reading by place holds the rows that are asked for, and of a parquet file the row groups used last: up to 256
MiB of them, at least one.
"""

import bisect
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from treepo.errors import DataError

_BATCH_ROWS = 1024
_KEPT_BYTES = 256 * 2**20


class BadRow(Exception):  # noqa: N818 (the user does not see it: it becomes a DataError or a count)
    """A row that cannot be used. reason: the few words under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


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
        """The value in a column; `a.b` is b inside column a. Raises BadRow."""
        if isinstance(self.content, BadRow):
            raise self.content
        if name in self.content:
            return self.content[name]
        value: Any = self.content
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise BadRow("no column", f"column {name!r} is absent; there are: {', '.join(self.content)}")
            value = value[part]
        return value


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


def open_rows(path: Path, columns: frozenset[str]) -> RowFile:
    """Open a .jsonl or .parquet file; of a parquet file only `columns` are read. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".parquet":
        return ParquetRows(path, columns)
    raise DataError(f"{path}: its name must end in .jsonl or .parquet, not {path.suffix!r}")


class _Unchanged:
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


class JsonLines:
    """A RowFile; a row's `at` is the byte where its line starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unchanged = _Unchanged(path)
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        index = at = blank = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(index, f"{self._path}:{number}", _json_object(line), at)
                    index += 1
                else:
                    blank += 1
                at += len(line)
        self.blank_lines = blank

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        self._unchanged.check()
        found = []
        with self._path.open("rb") as file:
            for index, at in rows:
                file.seek(at)
                content = _json_object(file.readline())
                found.append(Row(index, f"{self._path}, byte {at}", content, at))
        return found


def _json_object(line: bytes) -> dict[str, Any] | BadRow:
    """Parse one line. Not with orjson, which rounds an integer of more than 64 bits, as an answer may be."""
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow("not JSON", f"a JSON object is needed, not {type(content).__name__}")
    return content


class ParquetRows:
    """A RowFile; a row's `at` is its index."""

    def __init__(self, path: Path, columns: frozenset[str]) -> None:
        self._path, self._columns = path, columns
        self._unchanged = _Unchanged(path)
        self._groups: OrderedDict[int, Any] = OrderedDict()  # tables, the last one used at the end
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        import pyarrow  # here and below, not at the top: it takes half a second that JSON lines need not pay

        index = 0
        try:
            for batch in self._file.iter_batches(batch_size=_BATCH_ROWS, columns=self._top_columns):
                for content in batch.to_pylist():
                    yield self._row(index, content)
                    index += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        self._unchanged.check()
        group_of = [bisect.bisect_right(self._group_starts, index) - 1 for index, _ in rows]
        found: dict[int, Row] = {}
        for place in sorted(range(len(rows)), key=group_of.__getitem__):  # each group once
            index, _ = rows[place]
            offset = index - self._group_starts[group_of[place]]
            (content,) = self._group(group_of[place]).slice(offset, 1).to_pylist()
            found[place] = self._row(index, content)
        return [found[place] for place in range(len(rows))]

    def _row(self, index: int, content: Mapping[str, Any]) -> Row:
        return Row(index, f"{self._path}, row {index + 1}", content, index)

    def _group(self, number: int) -> Any:
        """Read a row group, or find it among those kept."""
        import pyarrow

        if number not in self._groups:
            try:
                self._groups[number] = self._file.read_row_group(number, columns=self._top_columns)
            except (pyarrow.ArrowException, OSError) as error:
                raise self._unreadable(error) from error
        self._groups.move_to_end(number)
        while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _KEPT_BYTES:
            self._groups.popitem(last=False)
        return self._groups[number]

    @cached_property
    def _file(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self._path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    @cached_property
    def _top_columns(self) -> list[str]:
        """The columns to read; a nested one is read with the whole column that contains it."""
        names = self._file.schema_arrow.names
        wanted = {name: name if name in names else name.split(".")[0] for name in self._columns}
        for name, top in sorted(wanted.items()):
            if top not in names:
                raise DataError(f"{self._path}: column {name!r} is absent; there are: {', '.join(names)}")
        return sorted(set(wanted.values()))

    @cached_property
    def _group_starts(self) -> list[int]:
        """The index of each row group's first row."""
        metadata = self._file.metadata
        starts = [0]
        for number in range(metadata.num_row_groups - 1):
            starts.append(starts[-1] + metadata.row_group(number).num_rows)
        return starts

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self._path}: it cannot be read as parquet: {error}")
