"""Rows of a data file: JSON lines or parquet, one at a time, with the place that an error message names."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo.errors import DataError

_BATCH_ROWS = 1024


class BadRow(Exception):  # noqa: N818 (not the user's last word: it becomes a DataError or a count)
    """A row that cannot be used. reason: a few words under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """index: 0-based, blank lines not counted. place: for people ("gsm8k.jsonl:17"), 1-based.

    content: the columns, or what is wrong with the whole row.
    """

    index: int
    place: str
    content: Mapping[str, Any] | BadRow

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


def read_rows(path: Path, columns: frozenset[str]) -> Iterator[Row]:
    """The file's rows in order; of a parquet file only `columns` are read. Raises DataError for the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        return _json_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, columns)
    raise DataError(f"{path}: its name must end in .jsonl or .parquet, not {path.suffix!r}")


def _json_rows(path: Path) -> Iterator[Row]:
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield Row(index, f"{path}:{number}", _json_object(line))
            index += 1


def _json_object(line: bytes) -> dict[str, Any] | BadRow:
    """Not orjson: it reads an integer of more than 64 bits, which an answer may be, as a rounded float."""
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow("not JSON", f"a JSON object is needed, not {type(content).__name__}")
    return content


def _parquet_rows(path: Path, columns: frozenset[str]) -> Iterator[Row]:
    import pyarrow  # not at the top: half a second that JSON lines need not pay
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = {name: name if name in names else name.split(".")[0] for name in columns}
        for name, top in sorted(wanted.items()):
            if top not in names:
                raise DataError(f"{path}: column {name!r} is absent; there are: {', '.join(names)}")
        index = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=sorted(set(wanted.values()))):
            for content in batch.to_pylist():
                yield Row(index, f"{path}, row {index + 1}", content)
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: it cannot be read as parquet: {error}") from error
