"""What a broadcast through host memory sends in place of a part that has hardly changed (`weights.delta`).

A source and the ranks that read the same part each keep its bytes as they were last sent, in host memory. The
source then sends the delta, and the ranks apply it to theirs. Both forget everything when they leave their
group, so the first update after engines have joined is whole.
"""

import torch
from torch import Tensor

from treepo.weight_sync.delta import apply, encode

Place = tuple[int, int]
"""A bucket's number, and that of a part in it."""


class SentParts:
    """A source's parts."""

    def __init__(self) -> None:
        self._sent: dict[Place, Tensor] = {}

    def message(self, place: Place, part: Tensor) -> tuple[Tensor, int]:
        """What to send in place of the part, uint8 [bytes], and its length if it is a delta, else 0.

        It is sent, or the group ends.
        """
        before = self._sent.get(place)
        if before is None:
            self._sent[place] = part.clone()
            return part, 0
        assert len(before) == len(part), "the model has other tensors than before"
        delta = encode(before.numpy(), part.numpy())
        before.copy_(part)
        if len(delta) >= len(part):
            return part, 0
        return torch.frombuffer(bytearray(delta), dtype=torch.uint8), len(delta)

    def forget(self) -> None:
        self._sent.clear()


class ReceivedParts:
    """One rank's parts, by the numbers of their buckets."""

    def __init__(self) -> None:
        self._words: dict[int, Tensor] = {}  # of an even number of bytes each

    def room(self, bucket: int, nbytes: int) -> Tensor:
        """Where a whole part arrives: uint8 [nbytes]."""
        if bucket not in self._words:
            self._words[bucket] = torch.zeros(nbytes + nbytes % 2, dtype=torch.uint8)
        return self._words[bucket][:nbytes]

    def changed(self, bucket: int, delta: Tensor, nbytes: int) -> Tensor:
        """The part after a delta: uint8 [nbytes]. Raises RuntimeError if the delta is damaged."""
        try:
            apply(delta.numpy().tobytes(), self._words[bucket])
        except ValueError as error:
            raise RuntimeError(f"bucket {bucket}: {error}") from error
        return self._words[bucket][:nbytes]
