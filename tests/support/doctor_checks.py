"""Checks that pass, fail, crash, hang and litter; the doctor's child processes import them by name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from treepo.doctor.check import Outcome, failed, passed, skipped
from treepo.errors import EngineError


def good() -> Outcome:
    sys.stdout.write("noise\n")
    return passed("there")


def bad() -> Outcome:
    return failed("not [there]", "put it there")


def absent() -> Outcome:
    return skipped("nothing of the kind")


def refuses() -> Outcome:
    raise EngineError("it does not start")


def crashes() -> Outcome:
    raise KeyError("a bug")


def dies() -> Outcome:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["CHILD_OF_DIES"]).write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
    return passed("never said")


def leaves() -> Outcome:
    sys.exit(0)


def hangs() -> Outcome:
    sys.stdout.write("it waits\n")
    sys.stdout.flush()
    while True:
        time.sleep(60)


def litters() -> Outcome:
    (Path(mkdtemp()) / "file").touch()
    return passed(gettempdir())
