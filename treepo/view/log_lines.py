"""Reads log.txt: its entries, and those that are events of the run."""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from treepo.errors import printable
from treepo.training.run_state import CONTINUES

_MOST_BYTES = 2**23  # that are read, of the end
_ENTRY = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ([A-Z]+) ([\w.]+): (.*)")
_TIME = "%Y-%m-%d %H:%M:%S,%f"


class Entry(NamedTuple):
    """One entry of a log.

    time: Unix seconds; the log has the local time of the machine, which is taken for that of this one. text:
    may have several lines, such as those of a traceback.
    """

    time: float
    level: str
    logger: str
    text: str


def log_entries(path: Path) -> list[Entry]:
    """The entries of a log, or of its last 8 MiB. A file that is not there has none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _MOST_BYTES, 0))
        text = file.read(_MOST_BYTES).decode("utf-8", "replace")
    entries: list[Entry] = []
    for line in text.split("\n"):
        entry = _entry(line)
        if entry is not None:
            entries.append(entry)
        elif entries and line:  # a line before the first entry is the rest of one that is not read
            last = entries.pop()
            entries.append(last._replace(text=f"{last.text}\n{printable(line)}"))
    return entries


def events(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that tell what happened to a run: warnings, errors, and that it was continued."""
    return [entry for entry in entries if entry.level != "INFO" or entry.text.startswith(CONTINUES)]


def _entry(line: str) -> Entry | None:
    match = _ENTRY.fullmatch(line)
    if match is None:
        return None
    time, level, logger, text = match.groups()
    try:
        return Entry(datetime.strptime(time, _TIME).timestamp(), level, logger, printable(text))
    except ValueError:  # a day that does not exist
        return None
