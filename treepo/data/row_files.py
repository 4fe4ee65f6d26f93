"""Rows of a JSON lines or parquet file, or of a folder of such files, read in order or by place.

A file may be larger than memory. Reading in order holds one row (JSON lines) or one batch of rows (parquet).
Reading by place holds the rows that are asked for, and of parquet files the row groups used last: up to 256
MiB of them, at least one.
"""

import bisect
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from treepo.data.rows import BadRow, Row, RowFile, names_of
from treepo.errors import DataError, one_line

_BATCH_ROWS = 1024
_KEPT_BYTES = 256 * 2**20
_READERS = (".jsonl", ".parquet")
_CONVERT = {
    ".json": "; a file with one JSON array becomes JSON lines by jq -c '.[]'",
    ".gz": "; unpack it by gunzip",
    ".zst": "; unpack it by unzstd",
}
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(?![a-zA-Z])")
_OTHER_FORMATS = {
    b"\x1f\x8b": "it is compressed; unpack it by gunzip",
    b"PAR1": "it is a parquet file; its name must end in .parquet",
    b"\xff\xfe": "it is UTF-16; write it as UTF-8",
    b"\xfe\xff": "it is UTF-16; write it as UTF-8",
    b"[": "it is one JSON array, not one JSON object on each line; jq -c '.[]' converts it",
}

type Groups = OrderedDict[tuple[Path, int], Any]
"""Row groups of parquet files as tables, by file and number, the last one used at the end."""


def open_rows(path: Path, columns: frozenset[str]) -> RowFile:
    """Open a .jsonl or .parquet file, or a folder of either; of parquet only `columns` are read.

    Raises DataError.
    """
    if path.is_dir():
        return RowFolder(path, columns)
    return _open_file(path, columns, OrderedDict())


def _open_file(path: Path, columns: frozenset[str], groups: Groups) -> RowFile:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in _READERS:
        raise DataError(
            f"{path}: its name must end in {' or '.join(_READERS)}, not {path.suffix!r}"
            + _CONVERT.get(path.suffix, "")
        )
    try:
        with path.open("rb") as file:
            start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: it is a pointer of Git LFS, not the file; git lfs pull fetches the file")
    if path.suffix == ".parquet":
        return ParquetRows(path, columns, groups)
    for mark, said in _OTHER_FORMATS.items():
        if start.startswith(mark):
            raise DataError(f"{path}: {said}")
    return JsonLines(path)


class RowFolder:
    """A RowFile: all files of a folder as one set, in the order of their names.

    A row's `index` counts on from file to file; its `at` is that in its file.
    """

    def __init__(self, path: Path, columns: frozenset[str]) -> None:
        try:
            content = sorted(path.iterdir())
        except OSError as error:
            raise DataError(f"{path}: it cannot be read: {error.strerror}") from error
        paths = [
            file
            for file in content
            if file.suffix in _READERS and not file.name.startswith((".", "_")) and file.is_file()
        ]
        if not paths:
            raise DataError(f"{path}: a folder without a {' or '.join(_READERS)} file in it")
        if len({file.suffix for file in paths}) > 1:
            raise DataError(f"{path}: a folder with both {' and '.join(_READERS)} files; name one of them")
        splits = {match[1] for file in paths if (match := _SPLIT.match(file.name))}
        if len(splits) > 1:
            raise DataError(
                f"{path}: a folder with files of several splits, {', '.join(sorted(splits))}; name one file, "
                "or a folder with the files of one split"
            )
        groups: Groups = OrderedDict()
        self._files = [_open_file(file, columns, groups) for file in paths]
        self._starts: list[int] = []  # the index of each file's first row, once all rows have been read
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        starts, index = [], 0
        for file in self._files:
            starts.append(index)
            for row in file:
                yield replace(row, index=index)
                index += 1
        self._starts = starts
        self.blank_lines = sum(file.blank_lines for file in self._files)

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        assert self._starts, "rows are known by place once all have been read in order"
        places: dict[int, list[int]] = {}
        for place, (index, _) in enumerate(rows):
            places.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(place)
        found: dict[int, Row] = {}
        for number, asked in places.items():
            inside = [(rows[place][0] - self._starts[number], rows[place][1]) for place in asked]
            for place, row in zip(asked, self._files[number].read(inside), strict=True):
                found[place] = replace(row, index=rows[place][0])
        return [found[place] for place in range(len(rows))]


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
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"not JSON: {error.msg} at character {error.pos + 1} of the line")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow("not JSON", f"a JSON object is needed, not {type(content).__name__}")
    return content


class ParquetRows:
    """A RowFile; a row's `at` is its index. The files of a folder share the row groups that are kept.

    The file is open only while it is read: a folder may have more files than a process may open.
    """

    def __init__(self, path: Path, columns: frozenset[str], groups: Groups) -> None:
        self._path, self._columns = path, columns
        self._unchanged = _Unchanged(path)
        self._groups = groups
        self._metadata: Any = None  # once the file has been opened
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        index = 0
        with self._open() as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=self._top_columns):
                for content in _contents(batch):
                    yield self._row(index, content)
                    index += 1

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        self._unchanged.check()
        group_of = [bisect.bisect_right(self._group_starts, index) - 1 for index, _ in rows]
        found: dict[int, Row] = {}
        for place in sorted(range(len(rows)), key=group_of.__getitem__):  # each group once
            index, _ = rows[place]
            offset = index - self._group_starts[group_of[place]]
            (content,) = _contents(self._group(group_of[place]).slice(offset, 1))
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
        wanted = {name: name if name in names else name.split(".")[0] for name in self._columns}
        for name, top in sorted(wanted.items()):
            if top not in names:
                raise DataError(f"{self._path}: column {name!r} is absent; there are: {names_of(names)}")
            if names.count(top) > 1:
                raise DataError(
                    f"{self._path}: column {top!r} is there {names.count(top)} times; rename others"
                )
        return sorted(set(wanted.values()))

    @cached_property
    def _group_starts(self) -> list[int]:
        """The index of each row group's first row."""
        with self._open() as file:
            metadata = file.metadata
        starts = [0]
        for number in range(metadata.num_row_groups - 1):
            starts.append(starts[-1] + metadata.row_group(number).num_rows)
        return starts


def _contents(part: Any) -> list[Mapping[str, Any] | BadRow]:
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
