"""Reward functions as a user writes them, for tests of `reward.function`. They run in grading processes."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

_HOARD: list[bytearray] = []


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


_ACTIONS = {
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
}
