"""A reward function whose module takes longer to import than the test's deadline allows an item."""

import time
from collections.abc import Mapping

time.sleep(2.5)


def nap_if_asked(prompt: str, response: str, answer: str, extra: Mapping[str, object]) -> float:  # noqa: ARG001 (the signature of a reward function)
    if response == "nap":
        time.sleep(600)
    return 1.0
