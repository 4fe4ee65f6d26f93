"""The folder that a command writes to: the files that every command leaves, and how they are written.

An OSError of a write names its file; the command line shows it as one line.
"""

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from treepo.config.base import Section
from treepo.config.load import dump_config
from treepo.data.background_writer import BackgroundWriter, BufferedFile, naming
from treepo.data.folder_lock import LOCK
from treepo.errors import ConfigError, PrintableFormatter

CONFIG, TREES, SUMMARY, LOG = "config.yaml", "trees.jsonl", "summary.json", "log.txt"
HELDOUT_TREES = "heldout_trees.jsonl"
"""The trees of a run's evaluations, which no step has trained."""
_PREVIOUS = "previous-"
_PART = ".part"  # the suffix of a file that is being written
_MOST_LOG = 2**22  # bytes of the log that may wait for the disk


def prepare_folder(folder: Path, config: Section) -> None:
    """Create the folder, move an earlier command's files into `previous-N/`, write the configuration.

    Raises ConfigError if that fails, or if the folder holds other files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder, check_own(folder))
        write_file(folder / CONFIG, dump_config(config))
    except OSError as error:
        raise ConfigError(f"out: {error.filename}: {error.strerror}") from None


def check_own(folder: Path) -> list[Path]:
    """The files of the command that last wrote to the folder; none if there is no folder.

    Raises ConfigError if the files are not a command's, or cannot be listed.
    """
    try:
        entries = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"out: {error.filename}: {error.strerror}") from None
    files = [entry for entry in entries if not entry.name.startswith((_PREVIOUS, LOCK))]
    if files and folder / CONFIG not in files:
        raise ConfigError(f"out: {folder} has files in it, but not of a run ({CONFIG} is missing)")
    return files


def set_aside(folder: Path, files: Sequence[Path]) -> None:
    """Move files of the folder into its next `previous-N/`; do nothing if there are none."""
    if not files:
        return
    earlier = sum(entry.name.startswith(_PREVIOUS) for entry in folder.iterdir())
    aside = folder / f"{_PREVIOUS}{earlier + 1}"
    aside.mkdir()
    for entry in files:
        entry.rename(aside / entry.name)


def write_file(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises OSError with its name."""
    part = path.with_name(f"{path.name}{_PART}")
    try:
        with naming(path):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


class GrowingFile:
    """A context manager that appends whole lines to a file; each is in the file once `write` returns.

    Raises OSError with the file's name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self._path):
            os.close(self._file)

    def write(self, lines: bytes) -> None:
        """Append the lines. If the disk has no room for all of them, none is left in the file."""
        with naming(self._path):
            before = os.fstat(self._file).st_size
            rest = memoryview(lines)
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, before)
                raise

    def sync(self) -> int:
        """Wait until the file is on the disk, and return its size in bytes."""
        with naming(self._path):
            os.fsync(self._file)
            return os.fstat(self._file).st_size


class _LogFile(logging.Handler):
    """Gives lines to a file that a thread writes."""

    def __init__(self, file: BufferedFile, writer: BackgroundWriter) -> None:
        super().__init__()
        self._file, self._writer = file, writer

    def emit(self, record: logging.LogRecord) -> None:
        self._file.add(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        self._writer.wake()


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write to a file what our packages log while the body runs, and the error that ends it.

    A thread writes it, so that logging never waits for a disk. Raises OSError if the file cannot be opened.
    """
    file = BufferedFile(path, limit=_MOST_LOG, durable=False)
    file.open()
    with BackgroundWriter(others=[file]) as writer:
        yield from _logging_to(_LogFile(file, writer))


def _logging_to(handler: logging.Handler) -> Iterator[None]:
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("treepo", "sglang_rollout")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # the terminal's handler still shows warnings only
    try:
        yield
    except asyncio.CancelledError:  # by a signal, which has its line
        raise
    except BaseException:
        logging.getLogger(__name__).exception("the run ended early")
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
