"""Grading of mathematics can neither read files nor reach the network, whatever code it is made to run."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from treepo.config.reward import RewardConfig
from treepo.rewards import confinement, process
from treepo.rewards.grade import Ready
from treepo.rewards.math_answer import equal_answers
from treepo.rewards.pool import RewardPool
from treepo.rewards.system_calls import NUMBERS
from treepo.tree import Verdict

# Each layer by itself; `all` is what a grading process has.
_LAYERS = {
    "all": "confinement.confine()",
    "Python": "sys.addaudithook(confinement._Guard(confinement._libraries()))",
    "system calls": "supported = confinement._forbid_system_calls()",
    "reading": "supported = confinement._forbid_reading(confinement._libraries())",
}
_ATTEMPTS = """
import ctypes, importlib, json, mmap, os, signal, socket, subprocess, sys
import treepo.rewards.math_answer
from treepo.rewards import confinement
folder, secret, port = sys.argv[1], sys.argv[1] + "/secret", int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
def called(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
def raw_open(path, flags):  # past Python's own checks
    called(libc.open(path.encode(), flags, 0o600))
ATTEMPTS = {
    "read": lambda: open(secret).read(),
    "read by number": lambda: os.read(os.open(secret, os.O_RDONLY), 9),
    "read from C": lambda: raw_open(secret, os.O_RDONLY),
    "list": lambda: os.listdir(folder),
    "environment": lambda: open("/proc/self/environ").read(),
    "write": lambda: open(folder + "/new", "w"),
    "write from C": lambda: raw_open(folder + "/new", os.O_WRONLY | os.O_CREAT),
    "remove": lambda: os.remove(secret),
    "rename": lambda: os.rename(secret, secret + "2"),
    "touch": lambda: os.utime(secret, (1, 1)),
    "connect": lambda: socket.create_connection(("127.0.0.1", port)),
    "socket": lambda: socket.socket(socket.AF_UNIX),
    "socket from C": lambda: called(libc.socket(2, 1, 0)),
    "run": lambda: subprocess.run(["/bin/true"]),
    "shell": lambda: called(-os.system("true")),
    "fork": lambda: os.fork() or os._exit(0),
    "fork from C": lambda: called(libc.fork() or os._exit(0)),
    "kill": lambda: os.kill(os.getppid(), 0),
    "signal from C": lambda: called(libc.sigqueue(os.getppid(), 0, ctypes.c_void_p())),
}
supported = True
LAYER
outcomes = {}
for name, attempt in ATTEMPTS.items():
    try:
        attempt()
        outcomes[name] = "done"
    except OSError as error:
        outcomes[name] = type(error).__name__
import sympy.physics.units  # modules are still found
import sympy.integrals.risch
print(json.dumps([supported, outcomes]))
"""
_FROM_C = {"read from C", "write from C", "socket from C", "fork from C", "signal from C"}
_READS = {"read", "read by number", "read from C", "list", "environment"}
_WRITES = {"write", "write from C", "remove", "rename"}
_CHANGES = {"touch"}  # which Landlock lets through
_REST = {"connect", "socket", "socket from C", "run", "shell", "fork", "fork from C", "kill", "signal from C"}
_REFUSED = {
    "all": _READS | _WRITES | _CHANGES | _REST,
    "Python": (_READS | _WRITES | _CHANGES | _REST) - _FROM_C,
    "system calls": _WRITES | _CHANGES | _REST,
    "reading": _READS | _WRITES,
}


def outcomes_of(layer: str, folder: Path) -> dict[str, str]:
    """What each attempt came to in a process with one layer; skips if this kernel does not have it."""
    (folder / "secret").write_text("secret")
    code = _ATTEMPTS.replace("LAYER", _LAYERS[layer])
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, folder, str(server.getsockname()[1])],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    supported, outcomes = json.loads(done.stdout)
    if not supported:
        pytest.skip("this kernel does not have it")
    assert (folder / "secret").read_text() == "secret" or layer == "reading"
    return outcomes


@pytest.mark.parametrize("layer", _LAYERS)
def test_a_layer_refuses_what_it_says(layer: str, tmp_path: Path) -> None:
    outcomes = outcomes_of(layer, tmp_path)
    done = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert not done & _REFUSED[layer]
    assert not outcomes.keys() - _READS - _WRITES - _CHANGES - _REST


_DENIED_CALLS = """
import ctypes, errno, os, platform
from treepo.rewards import confinement
from treepo.rewards.system_calls import DENIED, NUMBERS
libc = ctypes.CDLL(None, use_errno=True)
numbers = NUMBERS.get(platform.machine(), {})
if confinement._forbid_system_calls():
    for name in DENIED:
        if name in numbers:
            result = libc.syscall(numbers[name], -1, -1, -1, -1)
            if result != -1 or ctypes.get_errno() != errno.EACCES:
                print(name, result, ctypes.get_errno())
"""


def test_the_kernel_refuses_every_call_of_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DENIED_CALLS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_the_numbers_are_the_kernels(machine: str, header: str) -> None:
    """As far as this machine has the headers, and they know the call."""
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not here")
    kernels = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    ours = {name: str(number) for name, number in NUMBERS[machine].items() if name in kernels}
    assert ours == {name: kernels[name] for name in ours}
    assert len(ours) > len(NUMBERS[machine]) - 6


def test_grading_processes_are_confined_and_still_grade(math_pool: RewardPool) -> None:
    expected = {"NoNewPrivs": "1"}
    if os.uname().machine in ("x86_64", "aarch64"):
        expected["Seccomp"] = "2"
    deadline = time.monotonic() + 60  # a worker that was replaced confines itself once it has started
    while not all(status.items() >= expected.items() for status in _statuses(math_pool)):
        assert time.monotonic() < deadline, list(_statuses(math_pool))
        time.sleep(0.1)


def _statuses(pool: RewardPool) -> Iterator[dict[str, str]]:
    """What the kernel says of each grading process."""
    for keeper in pool.worker_pids():
        for child in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            lines = Path(f"/proc/{child}/status").read_text().splitlines()
            yield dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch {mark}')",
        r"\text{__import__('os').system('touch {mark}')}",
        r"open('{mark}', 'w')",
        r"x_{__import__('os').system('touch {mark}')}",
        r"\operatorname{exec}(\text{open('{mark}','w')})",
        r"1 + \mathrm{eval}(\text{'open(chr(47)+chr(116),chr(119))'})",
        r"\sqrt{lambda: open('{mark}','w')}",
        r"5'+open('{mark}','w')+'",
        r'5"+str(open("{mark}","w"))+"',
    ],
)
def test_an_answer_is_never_run_as_code(answer: str, tmp_path: Path) -> None:
    """In this process, which is not confined."""
    mark = tmp_path / "mark"
    text = answer.replace("{mark}", str(mark))
    for gold in ("5", "x", text[:-1]):
        with suppress(ValueError, TypeError, AttributeError):  # math-verify's, the verdict `error`
            equal_answers(gold, text)
    assert not mark.exists()


def test_only_numbers_and_names_are_evaluated() -> None:
    from sympy.parsing.sympy_parser import parse_expr

    assert float(parse_expr("0.5")) == 0.5
    for text in ("().__class__", "Integer.__subclasses__()", "open('x')", "exit()", "[1]", "lambda: 1"):
        with pytest.raises(ValueError, match="neither a number nor a name"):
            parse_expr(text)
    with pytest.raises(ValueError, match="only text is evaluated"):
        parse_expr("0.5", evaluate=False)


def test_a_layer_that_the_kernel_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[object] = []
    monkeypatch.setattr(confinement.sys, "addaudithook", hooks.append)
    monkeypatch.setattr(confinement, "_forbid_reading", lambda _: False)
    monkeypatch.setattr(confinement, "_forbid_system_calls", lambda: True)
    assert [name.split()[0] for name in confinement.confine()] == ["Landlock"]
    assert len(hooks) == 1


@pytest.mark.parametrize("missing", [(), ("Landlock (reading files)", "seccomp (sockets)")])
def test_a_missing_layer_is_one_warning(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process.Worker, "wait_ready", lambda _: Ready(unconfined=missing))
    with RewardPool(RewardConfig(workers=2)) as pool:
        asyncio.run(pool.ready())
    said = [record.getMessage() for record in caplog.records if "confine" in record.getMessage()]
    assert len(said) == bool(missing)
    for message in said:
        assert "Landlock (reading files) and seccomp (sockets): Python's audit hook alone" in message


_REFUSED_WHILE_COMPARING = """
import os, sys
from multiprocessing.connection import Connection, Pipe
from treepo.rewards import math_answer, worker
from treepo.rewards.grade import GradeItem, Request

def sloppy(item):  # as sympy does: an error on the way, then "not equal"
    try:
        open("/etc/hostname")
    except Exception:
        pass
    return math_answer.math_grader(item)

ours, theirs = Pipe()
if os.fork() == 0:
    ours.close()
    worker.serve(worker.Pipe(theirs.fileno()), sloppy, 2**30, confined=True)
    os._exit(0)
theirs.close()
ours.recv()
ours.send(Request(1, GradeItem("boxed{2}".join(["\\\\", ""]), "3")))
print(ours.recv().grade.verdict, end="")
"""


def test_what_is_refused_is_an_error_and_no_wrong_answer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _REFUSED_WHILE_COMPARING], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == Verdict.ERROR, done.stderr
