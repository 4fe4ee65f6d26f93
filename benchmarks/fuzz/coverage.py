"""Which branches of our packages an input reaches, by `sys.monitoring`.

A line reports once, and a branch until both its ways have been taken; then Python no longer calls us there.
So a run slows down only while it finds something new.
"""

import sys
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parents[2]
_TOOL = sys.monitoring.PROFILER_ID
_EVENTS = sys.monitoring.events


class Coverage:
    """A context manager. folders: parts of file names whose code counts.

    found: lines and branches so far. `sys.monitoring` is the process's own, so there is one at a time.
    """

    def __init__(self, folders: tuple[str, ...]) -> None:
        self.found = 0
        self._inside = tuple(str(_ROOT / folder) for folder in folders)
        self._ways: dict[tuple[CodeType, int], int] = {}

    def __enter__(self) -> Self:
        sys.monitoring.use_tool_id(_TOOL, "treepo fuzz")
        sys.monitoring.register_callback(_TOOL, _EVENTS.LINE, self._line)
        sys.monitoring.register_callback(_TOOL, _EVENTS.BRANCH, self._branch)
        sys.monitoring.restart_events()
        sys.monitoring.set_events(_TOOL, _EVENTS.LINE | _EVENTS.BRANCH)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.monitoring.set_events(_TOOL, _EVENTS.NO_EVENTS)
        sys.monitoring.free_tool_id(_TOOL)

    def _line(self, code: CodeType, line: int) -> Any:
        del line
        if code.co_filename.startswith(self._inside):
            self.found += 1
        return sys.monitoring.DISABLE

    def _branch(self, code: CodeType, offset: int, destination: int) -> Any:
        if not code.co_filename.startswith(self._inside):
            return sys.monitoring.DISABLE
        first = self._ways.setdefault((code, offset), -1)
        if first == destination:
            return None
        self.found += 1
        self._ways[code, offset] = destination
        return None if first == -1 else sys.monitoring.DISABLE
