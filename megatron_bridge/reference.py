"""The reference model of the KL term: initial weights in host memory, swapped in to compute log-probs; with
adapters the frozen model without them, of which there is no second copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_bridge.adapters import Adapter
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


class WithoutAdapters:
    """The frozen model under `adapters`."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the body runs, the model computes without adapters."""
        for adapter in self._adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self._adapters:
                adapter.enabled = True
