"""What a supervised start needs of a task. `treepo.toy.problems` is one, and so is any module like it."""

from collections.abc import Hashable, Iterator
from typing import Protocol

import numpy as np


class Problem(Hashable, Protocol):
    """A problem of a task. The texts of all its problems have one length."""

    @property
    def text(self) -> str:
        """What the user's message says."""
        ...

    def solution(self) -> str:
        """A right response, as long as any."""
        ...


class Task[P: Problem](Protocol):
    """A module with these functions."""

    @property
    def __name__(self) -> str: ...
    @property
    def __file__(self) -> str | None: ...

    @staticmethod
    def draw_problem(rng: np.random.Generator, /) -> P:
        """Draw a problem."""
        ...

    @staticmethod
    def demonstrate(problem: P, rng: np.random.Generator, /) -> str:
        """Draw a response to learn from, which may be wrong."""
        ...

    @staticmethod
    def is_correct(problem: P, response: str, /) -> bool:
        """Whether a response is right."""
        ...

    @staticmethod
    def rows(problems: list[P], split: str, /) -> Iterator[dict[str, object]]:
        """The problems as rows of a file in the columns of m-a-p/TreePO_data."""
        ...
