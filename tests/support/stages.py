"""Stages for the tests of benchmarks/gpu/stage_process.py, whose processes import them from here."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu.stage_process import Context, Figures, SkippedError


def passes(_: Context) -> Figures:
    return {"headline": "fine", "process": os.getpid()}


def fails(_: Context) -> Figures:
    raise ValueError("wrong by 3")


def skips(_: Context) -> Figures:
    raise SkippedError("no such device")


def dies(_: Context) -> Figures:
    os._exit(3)


def hangs(context: Context) -> Figures:
    child = os.fork()
    if not child:
        time.sleep(1000)
    (context.settings.scratch / "child").write_text(str(child))
    sys.stderr.write("about to hang\n")
    time.sleep(1000)
    return {}


def shares(context: Context) -> Figures:
    @contextmanager
    def make() -> Iterator[int]:
        yield 1
        (context.settings.scratch / "closed").touch()

    return {"headline": "shared", "value": context.shared("one", make)}
