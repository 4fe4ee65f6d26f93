"""Rows of a parquet file. Whatever its compressed pages unpack to, reading it has a bound on memory."""

import bisect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from treepo.data.bounds import bounded_memory
from treepo.data.rows import AbsentColumnError, BadRow, Row, Unchanged, names_of
from treepo.errors import DataError, one_line

_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 30
_KEPT_BYTES = 256 * 2**20

type Groups = OrderedDict[tuple[Path, int], Any]
"""Row groups of parquet files as tables, by file and number, the last one used at the end."""


class ParquetRows:
    """A RowFile; a row's `at` is its index. The files of a folder share the row groups that are kept.

    The file is open only while it is read: a folder may have more files than a process may open.
    """

    def __init__(self, path: Path, columns: frozenset[str], groups: Groups) -> None:
        self._path, self._columns = path, columns
        self._unchanged = Unchanged(path)
        self._groups = groups
        self._metadata: Any = None  # once the file has been opened
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        index = 0
        with self._open() as file:
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=self._top_columns)
            while (contents := self._nextcontents_of(batches, index)) is not None:
                for content in contents:
                    yield self._row(index, content)
                    index += 1

    def _nextcontents_of(self, batches: Iterator[Any], index: int) -> list[Mapping[str, Any] | BadRow] | None:
        """The next batch, which begins with row `index`; None at the end.

        A compressed file of a few kilobytes may hold a batch of any size.
        """
        try:
            with bounded_memory(_BATCH_BYTES):
                batch = next(batches, None)
                return None if batch is None else contents_of(batch)
        except MemoryError:
            raise DataError(
                f"{self._path}, row {index + 1}: it and the {_BATCH_ROWS - 1} rows after it need more than "
                f"{_BATCH_BYTES >> 30} GiB of memory"
            ) from None

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        self._unchanged.check()
        group_of = [bisect.bisect_right(self._group_starts, index) - 1 for index, _ in rows]
        found: dict[int, Row] = {}
        for place in sorted(range(len(rows)), key=group_of.__getitem__):  # each group once
            index, _ = rows[place]
            offset = index - self._group_starts[group_of[place]]
            group = self._group(group_of[place])
            if not 0 <= offset < group.num_rows:
                raise DataError(
                    f"{self._path}: it cannot be read as parquet: its row groups have other sizes"
                )
            (content,) = contents_of(group.slice(offset, 1))
            found[place] = self._row(index, content)
        return [found[place] for place in range(len(rows))]

    def _row(self, index: int, content: Mapping[str, Any] | BadRow) -> Row:
        return Row(index, f"{self._path}, row {index + 1}", content, index)

    def _group(self, number: int) -> Any:
        """Read a row group, or find it among those kept."""
        key = (self._path, number)
        if key not in self._groups:
            with self._open() as file:
                self._groups[key] = file.read_row_group(number, columns=self._top_columns)
        self._groups.move_to_end(key)
        while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _KEPT_BYTES:
            self._groups.popitem(last=False)
        return self._groups[key]

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Open the file. Whatever pyarrow raises while it is open becomes a DataError."""
        import pyarrow  # here, not at the top: it takes half a second that JSON lines need not pay
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path, metadata=self._metadata) as file:
                self._metadata = file.metadata
                yield file
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # the last if names are not UTF-8
            raise DataError(f"{self._path}: it cannot be read as parquet: {one_line(error)}") from error

    @cached_property
    def _top_columns(self) -> list[str]:
        """The columns to read; a nested one is read with the whole column that contains it."""
        with self._open() as file:
            names = file.schema_arrow.names
        return top_columns(self._path, self._columns, names)

    @cached_property
    def _group_starts(self) -> list[int]:
        """The index of each row group's first row."""
        with self._open() as file:
            metadata = file.metadata
        starts = [0]
        for number in range(metadata.num_row_groups - 1):
            starts.append(starts[-1] + metadata.row_group(number).num_rows)
        return starts


def top_columns(path: Path, columns: frozenset[str], names: Sequence[str]) -> list[str]:
    """The columns of a file that are read for `columns`: a nested one needs the whole column above it.

    names: the columns that the file has. Raises DataError.
    """
    wanted = {name: name if name in names else name.split(".")[0] for name in columns}
    for name, top in sorted(wanted.items()):
        if top not in names:
            raise AbsentColumnError(f"{path}: column {name!r} is absent; there are: {names_of(names)}")
        if list(names).count(top) > 1:
            raise DataError(f"{path}: column {top!r} is there {list(names).count(top)} times; rename others")
    return sorted(set(wanted.values()))


def contents_of(part: Any) -> list[Mapping[str, Any] | BadRow]:
    """The rows of an Arrow table or batch as Python values."""
    try:
        return part.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond Python's
        return [_content(part, at) for at in range(part.num_rows)]


def _content(part: Any, at: int) -> Mapping[str, Any] | BadRow:
    content = {}
    for name, column in zip(part.schema.names, part.columns, strict=True):
        try:
            content[name] = column[at].as_py()
        except (ValueError, OverflowError) as error:
            return BadRow("not readable", f"column {name!r} cannot be read: {one_line(error)}")
    return content
