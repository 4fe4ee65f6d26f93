"""The reference model of the KL term: initial weights in host memory, swapped in to compute log-probs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ReferenceWeights:
    """A copy of this rank's weights as `chunks` hold them now. The device never holds a second copy."""

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._initial = self._to_host()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the body runs, the model has the initial weights; afterwards it has its own again."""
        current = self._to_host()
        self._to_model(self._initial)
        try:
            yield
        finally:
            self._to_model(current)

    def _to_host(self) -> list[torch.Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]

    def _to_model(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)
