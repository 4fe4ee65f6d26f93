"""Rows of a JSON lines or parquet file, of a folder of such files, or of a dataset that `datasets` has saved,
read in order or by place.

A file may be larger than memory. Reading in order holds one row (JSON lines, at most 16 MiB) or one batch of
rows (parquet). Reading by place holds the rows that are asked for, and of parquet files the row groups used
last: up to 256 MiB of them, at least one.
"""

import bisect
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treepo.data.arrow_rows import ArrowRows
from treepo.data.parquet_rows import Groups, ParquetRows
from treepo.data.rows import BadRow, Row, RowFile, Unchanged, names_of, show
from treepo.errors import DataError, one_line

_MOST_LINE = 16 << 20  # bytes of a row as JSON
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


def open_rows(path: Path, columns: frozenset[str]) -> RowFile:
    """Open a .jsonl or .parquet file, a folder of either, or one that `datasets` has saved; of parquet and
    Arrow only `columns` are read.

    Raises DataError.
    """
    if path.is_dir():
        return RowFolder(path, columns)
    return _open_file(path, columns, OrderedDict())


def _open_file(path: Path, columns: frozenset[str], groups: Groups) -> RowFile:
    if not path.is_file():
        raise DataError(f"{path}: " + ("neither a file nor a folder" if path.exists() else "no such file"))
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


def _row_files(path: Path) -> list[Path]:
    """The files of a folder, which are of one kind and one split."""
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
    return paths


def _saved_files(path: Path) -> list[Path] | None:
    """The Arrow files of a dataset that `datasets` has saved, in order; None if the folder is none."""
    if (splits := _json_file(path / "dataset_dict.json")) is not None:
        names = names_of(splits.get("splits") or [])
        raise DataError(f"{path}: a dataset with the splits {names}; name the folder of one of them")
    state = _json_file(path / "state.json")
    if state is None:
        return None
    if state.get("_indices_data_files"):
        raise DataError(f"{path}: a dataset with an index of its rows; save it after flatten_indices()")
    files = state.get("_data_files")
    names = [one.get("filename") if isinstance(one, dict) else None for one in files or [None]]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (path / name).is_file():
            raise DataError(f"{path / 'state.json'}: it names {show(name)}, which is no file of the folder")
    return [path / name for name in names if name is not None]


def _json_file(path: Path) -> dict[str, Any] | None:
    """The object in a file; None without the file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: it cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


class RowFolder:
    """A RowFile: all files of a folder as one set, in the order of their names.

    A row's `index` counts on from file to file; its `at` is that in its file.
    """

    def __init__(self, path: Path, columns: frozenset[str]) -> None:
        paths = _saved_files(path)
        groups: Groups = OrderedDict()
        self._files: list[RowFile] = (
            [_open_file(file, columns, groups) for file in _row_files(path)]
            if paths is None
            else [ArrowRows(file, columns) for file in paths]
        )
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


class JsonLines:
    """A RowFile; a row's `at` is the byte where its line starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unchanged = Unchanged(path)
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        index = at = blank = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE + 1), b""), start=1):
                if line.strip():
                    yield Row(index, f"{self._path}:{number}", _json_object(line), at)
                    index += 1
                else:
                    blank += 1
                while len(line) > _MOST_LINE and not line.endswith(b"\n"):
                    line = file.readline(_MOST_LINE + 1)
                at = file.tell()
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
    if len(line) > _MOST_LINE:
        return BadRow("too long", f"a line of more than {_MOST_LINE >> 20} MiB")
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"not JSON: {error.msg} at character {error.pos + 1} of the line")
    except UnicodeDecodeError as error:
        return BadRow(
            "not JSON",
            f"not UTF-8 text: byte {error.start + 1} of the line is {error.object[error.start]:#04x}",
        )
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow("not JSON", f"a JSON object is needed, not {type(content).__name__}")
    return content
