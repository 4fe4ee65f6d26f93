"""What SGLang's processes write to standard error: passed on, and its last lines kept for errors.

A process of SGLang that fails writes a traceback and ends; its parent learns the exit code only.
"""

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from treepo.errors import one_line

_KEPT_LINES = 400
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b")
_LOADER = re.compile(r"error while loading shared libraries: (.*)")

_CAUSES = (
    (
        re.compile(r"(?:libraries: |OSError: )libcuda(?:rt)?\.so"),
        "SGLang's processes do not find the CUDA runtime: `treepo doctor --only 'cuda toolkit'` says what is "
        "missing",
    ),
    (
        re.compile(
            r"Could not find CUDA installation|find_cuda_home|assert cuda_home|nvcc: (?:command )?not found|"
            r"cannot find -lcudart|No such file or directory: '(?:ninja|nvcc|c\+\+)|"
            r"cuda_runtime\.h: No such file"
        ),
        "SGLang compiles kernels and finds no CUDA toolkit: `treepo doctor --only 'cuda toolkit'` says what "
        "is missing",
    ),
    (
        re.compile(r"Not enough memory|increase --mem-fraction-static"),
        "too little memory for weights and KV cache: raise engine.memory_fraction or engine.tensor, or leave "
        "the engine more memory (treepo plan)",
    ),
    (
        re.compile(r"OutOfMemoryError|CUDA out of memory"),
        "out of GPU memory: lower engine.memory_fraction or raise engine.tensor, and check with nvidia-smi "
        "that nothing else is on the GPU",
    ),
)
"""What a process writes, and what that means in terms of the configuration and the machine."""


class ChildOutput:
    """Standard error of the processes that are started in `recorded`, for as long as they run."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader: threading.Thread | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Processes that are started meanwhile write to a pipe, from which a thread passes everything on."""
        resource_tracker.ensure_running()  # it outlives the processes, so it is not to hold the pipe open
        sys.stderr.flush()
        original = os.dup(2)
        reading, writing = os.pipe()
        self._reader = threading.Thread(target=self._pass_on, args=(reading, os.dup(original)), daemon=True)
        self._reader.start()
        os.dup2(writing, 2)
        os.close(writing)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)

    def reason(self, seconds: float) -> str:
        """Why a process failed, in one line; empty if it did not say. seconds: to wait for its output."""
        if self._reader is not None:
            self._reader.join(seconds)  # it ends with the last of the processes
        return explain(list(self._lines))

    def _pass_on(self, reading: int, target: int) -> None:
        with os.fdopen(reading, errors="replace") as lines, os.fdopen(target, "w", errors="replace") as out:
            for line in lines:
                self._lines.append(line.rstrip("\n"))
                with suppress(OSError):  # our own standard error is closed
                    out.write(line)
                    out.flush()


def explain(lines: list[str]) -> str:
    """The cause that a failed process's output shows, and the remedy if it is a known one."""
    start = max((index for index, line in enumerate(lines) if "Traceback (most recent" in line), default=0)
    text = "\n".join(lines[start:])
    said = _last_error(lines)
    meaning = next((meaning for pattern, meaning in _CAUSES if pattern.search(text)), "")
    return f"{meaning} ({said})" if meaning and said else meaning or said


def _last_error(lines: list[str]) -> str:
    """The last exception, or what the loader says."""
    for line in reversed(lines):
        if (missing := _LOADER.search(line)) is not None:
            return one_line(missing[1])
        if _EXCEPTION.match(line):
            return one_line(line)
    return ""
