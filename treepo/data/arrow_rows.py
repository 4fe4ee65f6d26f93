"""Rows of an Arrow file as `datasets` saves it: a stream of record batches.

Reading in order holds one batch. Reading by place maps the file, so the system holds what fits in memory.
"""

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from treepo.data.bounds import bounded_memory
from treepo.data.parquet_rows import contents_of, top_columns
from treepo.data.rows import Row, Unchanged
from treepo.errors import DataError, one_line

_BATCH_BYTES = 4 << 30


class ArrowRows:
    """A RowFile; a row's `at` is its index."""

    def __init__(self, path: Path, columns: frozenset[str]) -> None:
        self._path, self._columns = path, columns
        self._unchanged = Unchanged(path)
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Row]:
        import pyarrow

        index = 0
        with (
            self._reported(),
            pyarrow.OSFile(str(self._path)) as file,
            pyarrow.ipc.open_stream(file) as reader,
        ):
            names = top_columns(self._path, self._columns, reader.schema.names)
            while (batch := self._next(reader, index)) is not None:
                for content in contents_of(batch.select(names)):
                    yield Row(index, f"{self._path}, row {index + 1}", content, index)
                    index += 1

    def _next(self, reader: Any, index: int) -> Any:
        """The next batch, which begins with row `index`; None at the end."""
        try:
            with bounded_memory(_BATCH_BYTES):
                batch = next(reader, None)
                if batch is not None:
                    batch.validate(full=True)  # a damaged file must not reach memory outside its own
                return batch
        except MemoryError:
            raise DataError(
                f"{self._path}, row {index + 1}: its batch needs more than {_BATCH_BYTES >> 30} GiB of memory"
            ) from None

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Row]:
        self._unchanged.check()
        found = []
        for index, _ in rows:
            number = bisect.bisect_right(self._starts, index) - 1
            batch, offset = self._batches[number], index - self._starts[number]
            if not 0 <= offset < batch.num_rows:
                raise DataError(f"{self._path}: it cannot be read as Arrow: its batches have other sizes")
            (content,) = contents_of(batch.slice(offset, 1))
            found.append(Row(index, f"{self._path}, row {index + 1}", content, index))
        return found

    @cached_property
    def _batches(self) -> list[Any]:
        """All batches, mapped; iteration has validated them."""
        import pyarrow

        with self._reported(), pyarrow.ipc.open_stream(pyarrow.memory_map(str(self._path))) as reader:
            names = top_columns(self._path, self._columns, reader.schema.names)
            return [batch.select(names) for batch in reader]

    @cached_property
    def _starts(self) -> list[int]:
        """The index of each batch's first row."""
        starts = [0]
        for batch in self._batches[:-1]:
            starts.append(starts[-1] + batch.num_rows)
        return starts

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what pyarrow raises for a damaged file into a DataError."""
        import pyarrow
        import pyarrow.ipc

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self._path}: it cannot be read as Arrow: {one_line(error)}") from error
