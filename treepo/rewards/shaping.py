"""Put grades on a tree's leaves, and add the terms to the grader's reward."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from treepo.config.reward import RewardConfig
from treepo.rewards.grade import Grade
from treepo.rewards.terms import TERMS, Responses
from treepo.tree import Tree, Verdict


def with_grades(
    tree: Tree, texts: Sequence[str], grades: Sequence[Grade], config: RewardConfig, max_response_tokens: int
) -> Tree:
    """Set the grader's reward, verdict, numbers and texts on each leaf, and the weighted value of each term.

    texts, grades: one a leaf, in the order of `leaves`. A leaf that could not be graded has no terms and
    counts in none. The reward is the grader's alone; `shaped` adds the terms.
    """
    leaves = [
        replace(leaf, reward=grade.reward, verdict=grade.verdict, numbers=grade.terms, texts=grade.texts)
        for leaf, grade in zip(tree.leaves, grades, strict=True)
    ]
    graded = [at for at, leaf in enumerate(leaves) if leaf.reward is not None]
    if config.terms and graded:
        responses = Responses(
            text_L=tuple(texts[at] for at in graded),
            tokens_L=np.array([len(tree.response(leaves[at])) for at in graded]),
            correct_L=np.array([leaves[at].verdict is Verdict.CORRECT for at in graded]),
            max_tokens=max_response_tokens,
            overlong_buffer_tokens=config.overlong_buffer_tokens,
        )
        value_L_of = {name: weight * TERMS[name](responses) for name, weight in config.terms.items()}
        for place, at in enumerate(graded):
            terms = {name: float(value_L[place]) for name, value_L in value_L_of.items()}
            leaves[at] = replace(leaves[at], terms=terms)
    return replace(tree, leaves=tuple(leaves))


def shaped(tree: Tree) -> Tree:
    """Add each graded leaf's terms to its reward; verdicts stay. Returns `tree` itself if no leaf has terms.

    Call it after dynamic sampling, which asks whether answers differ, not whether lengths do.
    """
    if not any(leaf.terms for leaf in tree.leaves):
        return tree
    return replace(
        tree,
        leaves=tuple(
            leaf if leaf.reward is None else replace(leaf, reward=leaf.reward + sum(leaf.terms.values()))
            for leaf in tree.leaves
        ),
    )
