"""The reference model of the KL term: initial weights in host memory, swapped in to compute log-probs."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_bridge.host_memory import Weights


class ReferenceWeights:
    """A copy of this rank's weights as they are now. The device never holds a second copy.

    Both host copies are made once and locked, so that a swap takes as long as the transfers.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._initial, self._current = weights.room(), weights.room()
        weights.save(self._initial)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the body runs, the model has the initial weights; afterwards it has its own again."""
        self._weights.save(self._current)
        self._weights.load(self._initial)
        try:
            yield
        finally:
            self._weights.load(self._current)
