"""SIGTERM and Ctrl-C end a command clean at whatever it does, and no process is left if the end hangs."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.support.command import heed_interrupts
from tests.support.paths import ROOT
from treepo.processes import kill_descendants

COMMAND = """
import asyncio, subprocess, sys, time
import typer
from treepo.cli.failures import stoppable
from treepo.cli.main import exit_code_of
from treepo.errors import EngineError

def command():
    kind = sys.argv[1]
    def left():
        if kind == "stalled":
            time.sleep(600)
        return "the files are in run/"

    with stoppable(left) as stopper:
        nowhere = subprocess.DEVNULL
        child = subprocess.Popen(
            ["sleep", "600"], stdout=nowhere, stderr=nowhere, start_new_session=True
        )
        print(child.pid, flush=True)
        if kind == "reading":
            time.sleep(600)
        if kind == "late":
            import treepo.ending
            treepo.ending.CLEANUP_SECONDS = 0.1
        async def work():
            print("works", flush=True)
            try:
                await asyncio.sleep(600)
            finally:
                if kind in ("hanging", "late", "stalled"):
                    print("ends", flush=True)
                    await asyncio.sleep(600)
                child.kill()
                child.wait()
                if kind == "failing":
                    raise EngineError("it broke at the end")
        stopper.run(work())

app = typer.Typer()
app.command()(lambda kind: command())
sys.exit(exit_code_of(app))
"""


def start(kind: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    return process, psutil.Process(int(line_of(process)))


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, " by SIGTERM"), (signal.SIGINT, 130, "")]
)
def test_work_is_cancelled_and_ends_with_one_line(number: int, code: int, name: str) -> None:
    process, child = start("working")
    assert line_of(process) == "works"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert said == f"Interrupted{name}. All processes have ended; the files are in run/\n"
    assert process.returncode == code
    assert not child.is_running()


def test_a_signal_before_there_is_work_has_the_same_line() -> None:
    process, child = start("reading")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert said == "Interrupted by SIGTERM. All processes have ended; the files are in run/\n"
    assert process.returncode == 143
    child.kill()


def test_an_error_while_it_ends_is_shown_too() -> None:
    process, _ = start("failing")
    assert line_of(process) == "works"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert said.splitlines() == [
        "error: it broke at the end",
        "Interrupted by SIGTERM. All processes have ended; the files are in run/",
    ]
    assert process.returncode == 143


@pytest.mark.parametrize("kind", ["hanging", "late"])
def test_a_second_signal_or_a_deadline_kills_what_hangs(kind: str) -> None:
    process, child = start(kind)
    assert line_of(process) == "works"
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "ends"
    if kind == "hanging":
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "Interrupted by SIGTERM. All processes have ended; the files are in run/"
    assert "Traceback" not in said
    assert process.returncode == 143
    assert not child.is_running()


def test_a_last_line_that_a_stalled_disk_delays_is_left_out() -> None:
    process, child = start("stalled")
    assert line_of(process) == "works"
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "ends"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "Interrupted."
    assert process.returncode == 143
    assert not child.is_running()


def test_a_process_that_cannot_be_killed_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "600"])
    with monkeypatch.context() as patched:
        patched.setattr(psutil.Process, "kill", lambda _: None)  # as of one that waits for a disk
        kill_descendants(0.05)
    assert child.poll() is None
    kill_descendants()
    assert not psutil.pid_exists(child.pid)


def test_an_ignored_signal_stays_ignored() -> None:
    """As Ctrl-C for a job in a shell's background, or for nohup."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from treepo.ending import Stopper\n"
        "with Stopper(str): print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n"


@pytest.mark.parametrize("skips", [True, False])
def test_exit_handlers_that_would_hang_are_skipped(skips: bool) -> None:
    program = f"""
import atexit
from treepo.ending import leave, skip_exit_handlers
atexit.register(print, "handler", flush=True)
print("result")
if {skips}:
    skip_exit_handlers()
leave(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == "result\n" + ("" if skips else "handler\n")
