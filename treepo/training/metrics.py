"""Numbers about a batch of graded trees. Tokens and lengths count response tokens, prompts excluded."""

from collections.abc import Sequence

import numpy as np

from treepo.tree import Leaf, Stop, Tree, Verdict


def accuracy(trees: Sequence[Tree]) -> float:
    """Share of the graded leaves that are correct; nan where none could be graded."""
    graded = [leaf for tree in trees for leaf in tree.leaves if leaf.verdict and leaf.verdict.graded]
    return sum(leaf.verdict is Verdict.CORRECT for leaf in graded) / len(graded) if graded else float("nan")


def tree_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """Rewards, verdicts, lengths, and how much the trees share."""
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    rewards = [leaf.reward for _, leaf in leaves if leaf.reward is not None]
    unique, total = sum(map(Tree.unique_tokens, trees)), sum(map(Tree.total_tokens, trees))
    shares = {f"stop/{stop}": sum(leaf.stop is stop for _, leaf in leaves) / len(leaves) for stop in Stop}
    for verdict in Verdict:
        shares[f"verdict/{verdict}"] = sum(leaf.verdict is verdict for _, leaf in leaves) / len(leaves)
    ungraded = sum(leaf.verdict is None or not leaf.verdict.graded for _, leaf in leaves)
    return {
        "reward": float(np.mean(rewards)) if rewards else float("nan"),
        "accuracy": accuracy(trees),
        "leaves": len(leaves),
        "leaves_ungraded": ungraded,
        "response_tokens": total / len(leaves),
        "tree_depth": float(np.mean([len(tree.path(leaf.segment)) for tree, leaf in leaves])),
        "tokens_unique": unique,
        "tokens_total": total,
        "total_over_unique": total / unique,
        **shares,
        **reward_metrics([leaf for _, leaf in leaves]),
    }


def reward_metrics(leaves: Sequence[Leaf]) -> dict[str, float]:
    """Means over the graded leaves that have them: each term of the reward, weight included, each further
    number that the grader returned; and the reward with its terms, where there are any.
    """
    means: dict[str, list[float]] = {}
    for leaf in leaves:
        for name, value in leaf.terms.items():
            means.setdefault(f"term/{name}", []).append(value)
        for name, value in leaf.numbers.items():
            means.setdefault(f"grader/{name}", []).append(value)
        if leaf.terms and leaf.reward is not None:
            means.setdefault("reward_with_terms", []).append(leaf.reward + sum(leaf.terms.values()))
    return {name: float(np.mean(values)) for name, values in means.items()}
