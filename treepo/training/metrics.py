"""Computes the metrics of a step. Tokens and lengths count response tokens, prompts excluded."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from treepo.config.heldout import HELDOUT
from treepo.learning.dynamic_sampling import uninformative
from treepo.protocols import BatchResult
from treepo.rewards.shaping import shaped
from treepo.training.tree_supply import Batch, Sampled
from treepo.tree import Leaf, Stop, Tree, Verdict

STEP_PHASES = {
    "sample": "seconds/sample",  # the trainer waits for trees
    "log-probs": "seconds/log_probs",
    "train": "seconds/train",
    "weight sync": "seconds/weight_sync",
}
"""The phases of a step, and the metrics that hold their seconds."""

_ACCURACY = re.compile(r"heldout/(?:([^/]+)/)?accuracy")


def step_metrics(
    batch: Batch,
    sampled: Sampled,
    result: BatchResult,
    seconds: Mapping[str, float],
    wall_seconds: float,
    trainer_restarts: int,
) -> dict[str, float]:
    """Collect all metrics of a step.

    seconds: of each of the STEP_PHASES. wall_seconds: since the end of the step before. trainer_restarts: of
    the run so far.
    """
    return (
        tree_metrics([finished.tree for finished in batch.sampled])
        | rollout_metrics(sampled)
        | {f"dropped/{reason}": count for reason, count in batch.dropped.items()}
        | {
            "staleness/mean": float(np.mean(batch.staleness)) if batch.staleness else 0.0,
            "staleness/max": max(batch.staleness, default=0),
            "trees/trained": len(batch.trained),
            "trees/growing": sampled.growing,
            "trees/ready": sampled.ready,
            "idle/engines": sampled.idle,
            "idle/trainer": seconds["sample"] / wall_seconds,
            "logprob_difference_mean": result.mismatch.mean,
            "logprob_difference_max": result.mismatch.largest,
            "train/optimizer_steps": len(result.taken),
            "train/skipped_steps": result.skipped,
        }
        | routing_metrics(result)
        | update_metrics(result.taken)
        | {metric: seconds[phase] for phase, metric in STEP_PHASES.items()}
        | {"seconds/step": wall_seconds, "trainer_restarts": trainer_restarts}
    )


def accuracy(trees: Sequence[Tree]) -> float:
    """Share of the graded leaves that are correct; nan if none could be graded."""
    graded = [leaf for tree in trees for leaf in tree.leaves if leaf.verdict and leaf.verdict.graded]
    return sum(leaf.verdict is Verdict.CORRECT for leaf in graded) / len(graded) if graded else float("nan")


def heldout_metric(name: str, metric: str) -> str:
    """The name in metrics.jsonl of a held-out set's number; `name` is the set's."""
    return f"heldout/{metric}" if name == HELDOUT else f"heldout/{name}/{metric}"


def evaluated_sets(metrics: Iterable[str]) -> list[str]:
    """The held-out sets that have an accuracy among these metrics, in their order."""
    found = map(_ACCURACY.fullmatch, metrics)
    return [one[1] or HELDOUT for one in found if one is not None]


def heldout_metrics(name: str, trees: Sequence[Tree]) -> dict[str, float]:
    """The numbers of the held-out set `name` in one evaluation, by their names in metrics.jsonl."""
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    numbers = {
        "accuracy": accuracy(trees),
        "standard_error": standard_error(trees),
        "response_tokens": sum(map(Tree.total_tokens, trees)) / len(leaves),
        "no_answer": sum(leaf.verdict is Verdict.NO_ANSWER for _, leaf in leaves) / len(leaves),
        "truncated": sum(leaf.stop is Stop.LIMIT for _, leaf in leaves) / len(leaves),
    }
    return {heldout_metric(name, metric): value for metric, value in numbers.items()}


def standard_error(trees: Sequence[Tree]) -> float:
    """The standard error of `accuracy` over prompts, whose answers stay together; nan for fewer than two.

    That of a ratio: sqrt(P / (P - 1) sum (c - a n)^2) / sum n, if c of a prompt's n graded leaves are correct
    and the accuracy is a. If all leaves are alike, which would make it 0, one prompt more is taken as right
    and one more as wrong.
    """
    verdicts = [
        [leaf.verdict for leaf in tree.leaves if leaf.verdict and leaf.verdict.graded] for tree in trees
    ]
    graded_P = np.array([len(one) for one in verdicts if one], float)
    correct_P = np.array([one.count(Verdict.CORRECT) for one in verdicts if one], float)
    prompts = len(graded_P)
    if prompts < 2:
        return float("nan")
    share = correct_P.sum() / graded_P.sum()
    if share in (0, 1):
        smoothed = (share * prompts + 1) / (prompts + 2)
        return math.sqrt(smoothed * (1 - smoothed) / prompts)
    squares = ((correct_P - share * graded_P) ** 2).sum()
    return math.sqrt(prompts / (prompts - 1) * squares) / float(graded_P.sum())


def mean_reward(trees: Sequence[Tree]) -> float:
    """Mean reward of the graded leaves, without terms; nan if none could be graded."""
    rewards = [leaf.reward for tree in trees for leaf in tree.leaves if leaf.reward is not None]
    return float(np.mean(rewards)) if rewards else float("nan")


def tree_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """Rewards, verdicts, stops, lengths, and how much the trees share."""
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    unique, total = sum(map(Tree.unique_tokens, trees)), sum(map(Tree.total_tokens, trees))
    shares = {f"stop/{stop}": sum(leaf.stop is stop for _, leaf in leaves) / len(leaves) for stop in Stop}
    for verdict in Verdict:
        shares[f"verdict/{verdict}"] = sum(leaf.verdict is verdict for _, leaf in leaves) / len(leaves)
    ungraded = sum(leaf.verdict is None or not leaf.verdict.graded for _, leaf in leaves)
    return {
        "reward": mean_reward(trees),
        "accuracy": accuracy(trees),
        "leaves": len(leaves),
        "leaves_ungraded": ungraded,
        "response_tokens": total / len(leaves),
        "tree_depth": float(np.mean([len(tree.path(leaf.segment)) for tree, leaf in leaves])),
        "tokens_unique": unique,
        "tokens_total": total,
        "total_over_unique": total / unique,
        "trees/informative": sum(uninformative(shaped(tree)) is None for tree in trees) / len(trees),
        **shares,
        **reward_metrics([leaf for _, leaf in leaves]),
    }


def file_metrics(trees: Sequence[Tree], names: Sequence[str]) -> dict[str, float]:
    """Of each file of a mixture: its share of the trees and, if it has any, their rewards and accuracy."""
    metrics: dict[str, float] = {}
    by_name: dict[str, list[Tree]] = {name: [] for name in names}
    for tree in trees if names else ():
        by_name[tree.prompt_id.rpartition(":")[0]].append(tree)
    for name, own in by_name.items():
        metrics[f"prompts_of/{name}"] = len(own) / len(trees)
        if own:
            metrics[f"reward_of/{name}"] = mean_reward(own)
            metrics[f"accuracy_of/{name}"] = accuracy(own)
    return metrics


def reward_metrics(leaves: Sequence[Leaf]) -> dict[str, float]:
    """Average each term of the reward (weight included), each further number that the grader returned and, if
    there are terms, the reward with them. A leaf counts in the means of the numbers that it has.
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


def rollout_metrics(sampled: Sampled) -> dict[str, float]:
    """The engines' work and failures since the last step."""
    stats = sampled.stats
    return {
        "rollout/decoded_tokens": stats.decoded_tokens,
        "rollout/tokens_per_second": stats.decoded_tokens / sampled.seconds if sampled.seconds else 0.0,
        "rollout/cached_token_ratio": stats.cached_token_ratio,
        "rollout/requests": stats.requests,
        "rollout/failed_requests": stats.failed_requests,
        "rollout/interrupted_requests": stats.interrupted_requests,
        "rollout/failed_trees": stats.failed_trees,
        "rollout/branchings": stats.branchings,
        "rollout/fallbacks": stats.fallbacks,
        "rollout/pruned_tokens": stats.pruned_tokens,
    }


def routing_metrics(result: BatchResult) -> dict[str, float]:
    """How often routers would have chosen other experts than were replayed; empty without replay."""
    differs = result.own_choice_differs
    return {} if differs is None else {"routing/own_choice_differs": differs}


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps that were taken; empty if none was."""
    names = updates[0] if updates else ()
    return {f"train/{name}": sum(update[name] for update in updates) / len(updates) for name in names}
