"""The folder that a command writes to: the files that every command leaves, and its log."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from treepo.config.base import Section
from treepo.config.load import dump_config
from treepo.errors import ConfigError

CONFIG, TREES, SUMMARY, LOG = "config.yaml", "trees.jsonl", "summary.json", "log.txt"
_PREVIOUS = "previous-"


def prepare_folder(folder: Path, config: Section) -> None:
    """Create the folder, move an earlier command's files into `previous-N/`, write the configuration.

    Raises ConfigError if that fails, or if the folder holds other files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [entry for entry in folder.iterdir() if not entry.name.startswith(_PREVIOUS)]
        if files and folder / CONFIG not in files:
            raise ConfigError(f"out: {folder} has files in it, but not of a run ({CONFIG} is missing)")
        set_aside(folder, files)
        (folder / CONFIG).write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(f"out: {error.filename}: {error.strerror}") from None


def set_aside(folder: Path, files: Sequence[Path]) -> None:
    """Move files of the folder into its next `previous-N/`; do nothing if there are none."""
    if not files:
        return
    earlier = sum(entry.name.startswith(_PREVIOUS) for entry in folder.iterdir())
    aside = folder / f"{_PREVIOUS}{earlier + 1}"
    aside.mkdir()
    for entry in files:
        entry.rename(aside / entry.name)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write to a file what our packages log while the body runs, and the error that ends it."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("treepo", "sglang_rollout")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # the terminal's handler still shows warnings only
    try:
        yield
    except BaseException:
        logging.getLogger(__name__).exception("the run ended early")
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
