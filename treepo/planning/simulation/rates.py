"""What a simulated engine must know of its device: seconds of forward passes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Prefill:
    """One batch of contexts.

    new: tokens to compute. context: all tokens, cached ones included. pairs: a new token and one that it
    attends to, itself included.
    """

    requests: int
    new: int
    context: int
    pairs: int


class Rates(Protocol):
    """latency: seconds from an answer to the arrival of the driver's next request."""

    @property
    def latency(self) -> float: ...

    def decode(self, requests: int, kv_tokens: np.ndarray) -> np.ndarray:
        """Seconds of decoding steps for `requests` requests, each step reading its number of KV tokens."""
        ...

    def prefill(self, batch: Prefill) -> float: ...
