"""The prompts of a mixture: several files, of which training draws by weight."""

import bisect
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import overload

from treepo.data.prompt_order import MixtureOrder
from treepo.data.prompts import Prompt, PromptSet


class PromptMixture(Sequence[Prompt]):
    """The usable prompts of several files, numbered one file after another; `order` says how training takes
    them.
    """

    def __init__(self, files: Mapping[str, PromptSet], weights: Sequence[int]) -> None:
        """files: by name. weights: whole numbers, of each file."""
        self._files, self._weights = dict(files), list(weights)
        self._sets = list(files.values())
        self._starts = list(accumulate(map(len, self._sets), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """Of the files' names, prompts and answers, in order."""
        parts = [f"{name} {prompts.fingerprint}" for name, prompts in self._files.items()]
        return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def order(self, seed: int) -> MixtureOrder:
        """The order in which training takes the prompts."""
        return MixtureOrder({name: len(file) for name, file in self._files.items()}, self._weights, seed)

    def summary(self, steps: int, prompts_per_step: int) -> str:
        """One line: what a run takes from each file, if it drops no tree."""
        order, total = self.order(seed=0), steps * prompts_per_step
        parts = []
        for number, (name, file) in enumerate(self._files.items()):
            share, taken = self._weights[number] / sum(self._weights), order.turns_before(number, total)
            parts.append(f"{name} {share:.1%}: {taken} of {len(file)} ({taken / len(file):.2f} epochs)")
        return f"prompts in {steps} steps of {prompts_per_step}: {'; '.join(parts)}"

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """A slice reads its prompts."""
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return self.take([range(len(self))[index]])[0]

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        """Read the prompts at `indices`, in this order; cheaper than one by one."""
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(place)
        found: dict[int, Prompt] = {}
        for number, asked in places.items():
            inside = [indices[place] - self._starts[number] for place in asked]
            found |= zip(asked, self._sets[number].take(inside), strict=True)
        return [found[place] for place in range(len(indices))]


type TrainingPrompts = PromptSet | PromptMixture
"""The training prompts of a run: `data.train` is one path, or a list."""
