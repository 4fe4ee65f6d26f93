"""SIGUSR1 shows where the command and the processes below it are, and ends none of them."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from treepo import stack_dumps

COMMAND = """
import asyncio, os, pathlib, signal, subprocess, sys
from treepo.watchdog import Watchdog, waiting

CHILD = '''
import time
from treepo.stack_dumps import heed_requests
def stuck():
    print("ready", flush=True)
    time.sleep(600)
heed_requests()
stuck()
'''

async def waits_for_an_engine():
    with waiting("the test", "an engine"):
        await asyncio.Event().wait()

async def main():
    folder = pathlib.Path(sys.argv[1])
    async with Watchdog(folder, 100):
        with open(folder / "child.err", "w") as log:
            child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=log)
        other = subprocess.Popen(["sleep", "600"])  # the signal would end it
        child.stdout.readline()
        task = asyncio.create_task(waits_for_an_engine())
        print("works", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(child.poll(), other.poll(), flush=True)
        child.kill(), other.kill()
        task.cancel()

asyncio.run(main())
"""


def test_threads_tasks_and_processes_are_in_one_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "works\n"
    process.send_signal(signal.SIGUSR1)
    assert "the stacks of 2 processes are in" in process.stderr.readline()
    output, errors = process.communicate("go on\n", timeout=60)
    assert (process.returncode, output, errors) == (0, "None None\n", "")
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "in waits_for_an_engine" in stacks, "a task"
    assert "in stuck" in stacks, "the process below"
    assert "Current thread" in stacks


def test_without_a_request_there_is_no_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.communicate(b"go on\n", timeout=60)
    assert process.returncode == 0
    assert not (tmp_path / "stacks.txt").exists()


def test_an_answer_after_the_command_s_end_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(stack_dumps, "_heeding", lambda: [psutil.Process(child.pid)])
    file = (tmp_path / "stacks.txt").open("wb")
    file.close()
    stack_dumps._dump_others(file, tmp_path / "stacks.txt")
    assert child.wait(60) == -signal.SIGUSR1


def test_a_launch_is_not_ended_by_it() -> None:
    program = (
        "import os, signal; from treepo.stack_dumps import ignore_requests\n"
        "ignore_requests(); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "signal.signal(signal.SIGUSR1, print); ignore_requests()\n"
        "print(signal.getsignal(signal.SIGUSR1) is print)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT) == b"True\n"
