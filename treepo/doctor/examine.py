"""Checks, each in a process of its own with a deadline: one that hangs or crashes is a failure and no more.

A process that is ended takes along the processes that it started, and nothing else; the temporary files of
a check are in a folder that goes with it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import psutil

from treepo.doctor.checks import Check
from treepo.doctor.outcome import Outcome, Result, Status, failed, from_document, skipped

_OUTPUT_LINES = 20
_END_SECONDS = 5.0  # for killed processes to be gone


def examine_all(checks: Iterable[Check], quick: bool) -> Iterator[tuple[Check, Result | None]]:
    """Each check twice: without a result before it starts, with one when it has ended. quick: those that take
    long are skipped.
    """
    for check in checks:
        yield check, None
        if quick and check.long:
            yield check, Result(check.name, skipped("left out by --quick"), 0.0)
        else:
            yield check, examine(check)


def examine(check: Check) -> Result:
    started = time.monotonic()
    with TemporaryDirectory(prefix="treepo-doctor-", ignore_cleanup_errors=True) as folder:
        outcome, output = _examine(check, Path(folder))
    return Result(check.name, outcome, time.monotonic() - started, output)


def _examine(check: Check, folder: Path) -> tuple[Outcome, tuple[str, ...]]:
    answer, log = folder / "outcome.json", folder / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "treepo.doctor.child", check.place, str(answer)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends that one
        )
    try:
        code = process.wait(check.seconds)
    except subprocess.TimeoutExpired:
        return failed(f"no answer within {check.seconds:g} s", check.remedy), _last_lines(log)
    finally:
        end_family(process)
    if code or not answer.is_file():
        return failed(_ending(code), check.remedy), _last_lines(log)
    outcome = from_document(orjson.loads(answer.read_bytes()))
    if outcome.status is Status.FAIL and not outcome.remedy:
        return replace(outcome, remedy=check.remedy), _last_lines(log)
    return outcome, ()


def _environment(folder: Path) -> dict[str, str]:
    environment = os.environ | {"TMPDIR": str(folder)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process compiles thousands of modules again
    return environment


def end_family(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, which has a session of its own, also where it has ended before."""
    family: list[psutil.Process] = []
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # what has left the session is still its child
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
    for member in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(member.pid) == process.pid:
                family.append(member)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=_END_SECONDS)
    process.poll()


def _ending(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        reason = " (was there enough memory?)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{reason}"
    return f"its process ended with exit code {code}"


def _last_lines(log: Path) -> tuple[str, ...]:
    lines = log.read_text(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip())[-_OUTPUT_LINES:]
