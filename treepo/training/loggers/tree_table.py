"""A table of sampled answers for loggers: each leaf of a few trees is a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treepo.tree import Tree

COLUMNS = (
    "step",
    "prompt_id",
    "prompt",
    "answer",
    "response",
    "verdict",
    "reward",
    "stop",
    "tokens",
    "segments",
)
_MOST_CHARACTERS = 8000  # of a text


@dataclass(frozen=True, slots=True)
class SampledTree:
    """A graded tree, its step and the gold answer of its prompt."""

    tree: Tree
    step: int
    answer: str


def rows_of(sampled: Sequence[SampledTree], decode: Callable[[np.ndarray], str]) -> list[list[Any]]:
    """The rows, in the order of COLUMNS. decode: makes text of tokens, int32 [T]."""
    return [row for one in sampled for row in _rows(one, decode)]


def _rows(one: SampledTree, decode: Callable[[np.ndarray], str]) -> list[list[Any]]:
    tree, prompt = one.tree, _cut(decode(one.tree.prompt))
    rows = []
    for leaf in tree.leaves:
        response = tree.response(leaf)
        verdict = None if leaf.verdict is None else str(leaf.verdict)
        row = [one.step, tree.prompt_id, prompt, _cut(one.answer), _cut(decode(response)), verdict]
        rows.append([*row, leaf.reward, str(leaf.stop), len(response), len(tree.path(leaf.segment))])
    return rows


def _cut(text: str) -> str:
    """The text without its middle if it is long."""
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"
