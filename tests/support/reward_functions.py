"""Reward functions as a user writes them, for tests of `reward.function`. They run in grading processes."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

_HOARD: list[object] = []


def length_and_match(
    prompt: str, response: str, answer: str, extra: Mapping[str, object]
) -> dict[str, float]:
    return {
        "reward": float(answer in response),
        "prompt_length": len(prompt),
        "response_length": len(response),
        "bonus": float(str(extra.get("bonus", 0))),
    }


def obey(prompt: str, response: str, answer: str, extra: Mapping[str, object]) -> object:  # noqa: ARG001 (the signature of a reward function)
    """Do what the response says: an action's name and its argument."""
    action, _, argument = response.partition(" ")
    return _ACTIONS[action](argument)


def _raise(argument: str) -> NoReturn:
    raise LookupError(argument)


def _cancel(argument: str) -> NoReturn:
    raise asyncio.CancelledError(argument)


def _print(argument: str) -> float:
    print(argument)  # noqa: T201 (a user's function may print)
    return 1.0


def _hoard(argument: str) -> float:
    _HOARD.append(bytearray(int(argument)))
    return 1.0


def _spawn(argument: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(argument).write_text(str(child.pid))
    time.sleep(600)


def _fork(action: str) -> float:
    """A child that returns or raises as its parent does, a moment earlier."""
    ending, _, reward = action.partition(" ")
    if os.fork() == 0:
        return 99.0 if ending == "return" else _FORKED[ending]()
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == (1 if ending == "raise" else 0), status
    return float(reward)


_FORKED = {"raise": lambda: _raise("in the child"), "sys.exit": sys.exit, "os._exit": lambda: os._exit(0)}


def _fork_in_a_thread(reward: str) -> float:
    thread = threading.Thread(target=_fork, args=(f"return {reward}",))
    thread.start()
    thread.join()
    return float(reward)


def _map(reward: str) -> float:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return sum(pool.map(float, [reward, "0", "0"]))


def _leave(action: str) -> float:
    """Leave a sleeping process behind, its id in a file; then return, crash or hang."""
    kind, ending, path = action.split(" ")
    if os.fork() == 0:
        if kind == "detached" and (os.setsid(), os.fork())[1]:
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(f"{path}.part").write_text(str(os.getpid()))
        Path(f"{path}.part").rename(path)
        time.sleep(600)
        os._exit(0)
    while not Path(path).exists():
        time.sleep(0.01)
    if ending == "crash":
        os._exit(3)
    if ending == "hang":
        time.sleep(600)
    return 1.0


def _close_descriptors(path: str) -> float:
    """Close all descriptors and let files take their numbers."""
    os.closerange(3, 256)
    for _ in range(16):
        os.open(path, os.O_RDWR | os.O_CREAT)
    return 1.0


def _change_surroundings(reward: str) -> float:
    os.chdir("/")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    threading.Thread(target=time.sleep, args=(600,)).start()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it is left open)
    return float(reward)


def _write_to_pipe(kind: str) -> float:
    """Write what is no message to every socket that the process has open."""
    garbage = {
        "garbage": b"\0\0\0\x04abcd",  # a whole message that is no pickle
        "code": _message_that_runs_code(),
        "huge": b"\x7f\xff\xff\xff",  # the length of a message of 2 GiB
        "flood": b"x" * 10_000_000,
    }[kind]
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), garbage)
    return 1.0


def _message_that_runs_code() -> bytes:
    content = b"cos\nsystem\n(S'touch /tmp/treepo-ran-code'\ntR."
    return len(content).to_bytes(4, "big") + content


def _leak_descriptors(number: str) -> float:
    _HOARD.extend(open(os.devnull) for _ in range(int(number)))  # noqa: SIM115  a leak
    return 1.0


_ACTIONS = {
    "write_to_pipe": _write_to_pipe,
    "leak_descriptors": _leak_descriptors,
    "end": lambda code: os._exit(int(code)),
    "reward": float,
    "text": str,
    "no_reward": lambda _: {"score": 1.0},
    "raise": _raise,
    "exit": lambda _: sys.exit(3),
    "crash": lambda _: os._exit(3),
    "segfault": lambda _: os.kill(os.getpid(), 11),
    "print": _print,
    "allocate": lambda size: float(len(bytearray(int(size)))),
    "hoard": _hoard,
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "spawn": _spawn,
    "fork": _fork,
    "fork_in_a_thread": _fork_in_a_thread,
    "map": _map,
    "leave": _leave,
    "close_descriptors": _close_descriptors,
    "change_surroundings": _change_surroundings,
    "signal": lambda name: os.kill(os.getpid(), getattr(signal, name)),
    "signal_group": lambda name: os.killpg(0, getattr(signal, name)),
    "execute": lambda command: os.execvp(command.split()[0], command.split()),
    "cancel": _cancel,
}
