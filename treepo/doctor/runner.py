"""Runs each check in a process of its own with a deadline, so that a check that hangs or crashes is a failed
check and the others go on.

Killing a check's process also kills the processes that it started, and no others. A check's temporary files
are in a folder that is deleted with it.

    python -m treepo.doctor.runner MODULE:FUNCTION FILE

runs one check and writes its outcome to FILE: the child's side.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import psutil

from treepo.doctor.check import Check, CheckResult, Outcome, Status, failed, skipped
from treepo.errors import TreepoError

_OUTPUT_LINES = 20
_KILL_SECONDS = 5.0  # for killed processes to disappear


def run_checks(checks: Iterable[Check], *, quick: bool) -> Iterator[tuple[Check, CheckResult | None]]:
    """Yields each check twice: without a result before it starts, with its result when it has ended.

    quick: skip the slow ones.
    """
    for check in checks:
        yield check, None
        if quick and check.slow:
            yield check, CheckResult(check.name, skipped("left out by --quick"), 0.0)
        else:
            yield check, run_check(check)


def run_check(check: Check) -> CheckResult:
    started = time.monotonic()
    with TemporaryDirectory(prefix="treepo-doctor-", ignore_cleanup_errors=True) as folder:
        outcome, output = _run_in_child(check, Path(folder))
    return CheckResult(check.name, outcome, time.monotonic() - started, output)


def _run_in_child(check: Check, folder: Path) -> tuple[Outcome, tuple[str, ...]]:
    answer, log = folder / "outcome.json", folder / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "treepo.doctor.runner", check.function, str(answer)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            start_new_session=True,  # Ctrl-C reaches only this process, which then kills the child
        )
    try:
        code = process.wait(check.deadline)
    except subprocess.TimeoutExpired:
        return failed(f"no answer within {check.deadline:g} s", check.remedy), _last_lines(log)
    finally:
        kill_with_descendants(process)
    if code or not answer.is_file():
        return failed(_exit_reason(code), check.remedy), _last_lines(log)
    document = orjson.loads(answer.read_bytes())
    outcome = Outcome(Status(document["status"]), document["found"], document["remedy"])
    if outcome.status is Status.FAIL and not outcome.remedy:
        return replace(outcome, remedy=check.remedy), _last_lines(log)
    return outcome, ()


def _environment(folder: Path) -> dict[str, str]:
    environment = os.environ | {"TMPDIR": str(folder)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process compiles thousands of modules again
    return environment


def kill_with_descendants(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its own session, and all that it started, even if it has ended already."""
    members: list[psutil.Process] = []
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # a descendant may have left the session
            root = psutil.Process(process.pid)
            members = [root, *root.children(recursive=True)]
    for candidate in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(candidate.pid) == process.pid:
                members.append(candidate)
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(members, timeout=_KILL_SECONDS)
    process.poll()


def _exit_reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        reason = " (was there enough memory?)" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{reason}"
    return f"its process ended with exit code {code}"


def _last_lines(log: Path) -> tuple[str, ...]:
    lines = log.read_text(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip())[-_OUTPUT_LINES:]


def write_outcome(function: str, file: Path) -> None:
    """Run one check in this process and write its outcome to `file`.

    A TreepoError is a failed outcome. Any other exception ends the process, and the parent reports the crash.
    """
    module, name = function.split(":")
    try:
        outcome = getattr(import_module(module), name)()
    except TreepoError as error:
        outcome = failed(str(error), "")
    partial = file.with_suffix(".partial")
    partial.write_bytes(orjson.dumps(asdict(outcome)))
    partial.replace(file)


if __name__ == "__main__":
    write_outcome(sys.argv[1], Path(sys.argv[2]))
