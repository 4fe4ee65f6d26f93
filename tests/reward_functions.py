"""Reward functions of a user's, for the tests of `reward.function`. They run in grading processes."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


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
    """Do what the response says."""
    word, _, argument = response.partition(" ")
    match word:
        case "reward":
            return float(argument)
        case "text":
            return argument
        case "no_reward":
            return {"score": 1.0}
        case "raise":
            raise LookupError(argument)
        case "exit":
            sys.exit(3)
        case "crash":
            os._exit(3)
        case "segfault":
            os.kill(os.getpid(), 11)
        case "print":
            print(argument)  # noqa: T201 (what a user's function may do)
            return 1.0
        case "allocate":
            return float(len(bytearray(int(argument))))
        case "hoard":
            _HOARD.append(bytearray(int(argument)))
            return 1.0
        case "sleep":
            time.sleep(float(argument))
            return 1.0
        case "spawn":
            child = subprocess.Popen(["sleep", "600"])
            Path(argument).write_text(str(child.pid))
            time.sleep(600)
    raise AssertionError(response)


_HOARD: list[bytearray] = []
