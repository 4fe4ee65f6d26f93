"""Whether trainer and engine give the same log-probs to the same tokens: a comparison of arrays.

The same weights, temperature and vocabulary give the same log-probs up to rounding. Whatever else makes
them differ makes every later step learn from wrong ratios, which looks like a bad hyper-parameter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from treepo.config.learning import LearningConfig
from treepo.learning.advantage import estimate
from treepo.learning.packing import Pack, pack_trees
from treepo.tree import Tree, Verdict

SUSPECTS = (
    "the temperature (sampled with one, scored with another), vocabulary padding (columns beyond the "
    "tokenizer's), fused kernels (engine.attention_backend), dtype (model.dtype on one side only), "
    "stale weights (the engine serves others than the trainer has; does the model folder hold two sets?)"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the sampled tokens of one engine's trees, a shared token once.

    mean, largest: of |trainer - engine|, in nats. prompt_id, token: the worst one's prompt, and its place in
    its response, from 1. engine, trainer: the two log-probs of that token.
    """

    tokens: int
    mean: float
    largest: float
    prompt_id: str
    token: int
    engine: float
    trainer: float

    def within(self, mean_limit: float, max_limit: float) -> bool:
        """False also where something is not a number."""
        return self.mean <= mean_limit and self.largest <= max_limit


def pack_sampled(trees: Sequence[Tree], max_tokens: int, replicas: int) -> list[list[Pack]]:
    """Packs in which every sampled token counts, whatever the responses are worth."""
    graded = [tree.graded([(0.0, Verdict.WRONG)] * len(tree.leaves)) for tree in trees]
    return pack_trees(graded, estimate(graded, LearningConfig()), max_tokens, replicas)


def compare(trees: Sequence[Tree], packs: Iterable[Iterable[Pack]]) -> Comparison:
    """packs: those of `pack_sampled` for all replicas, with the trainer's log-probs as `old_log_prob`."""
    columns: dict[str, list[np.ndarray]] = {"tree": [], "position": [], "engine": [], "trainer": []}
    for pack in chain.from_iterable(packs):
        assert pack.old_log_prob is not None, "attach the trainer's log-probs first"
        sampled = pack.count_pos + pack.count_neg > 0  # context is in another pack too
        columns["tree"].append(pack.tree[sampled])
        columns["position"].append(pack.position[sampled])
        columns["engine"].append(pack.rollout_log_prob[sampled])
        columns["trainer"].append(pack.old_log_prob[sampled])
    tree, position, engine, trainer = (np.concatenate(parts) for parts in columns.values())
    difference = np.abs(trainer - engine, dtype=np.float64)
    worst = int(difference.argmax())  # the first that is not a number, where there is one
    prompt = trees[tree[worst]]
    return Comparison(
        tokens=len(difference),
        mean=float(difference.mean()),
        largest=float(difference[worst]),
        prompt_id=prompt.prompt_id,
        token=int(position[worst]) - len(prompt.prompt) + 1,
        engine=float(engine[worst]),
        trainer=float(trainer[worst]),
    )


def disagreement(
    comparison: Comparison, engine: str, temperature: float, mean_limit: float, max_limit: float
) -> str:
    """One line for the user."""
    return (
        f"trainer and {engine} disagree on the log-probs of {comparison.tokens} tokens that it sampled at "
        f"temperature {temperature}: they differ by {comparison.mean:.2g} on average "
        f"(log_prob_check.mean_limit is {mean_limit:g}) and by up to {comparison.largest:.2g} "
        f"(log_prob_check.max_limit is {max_limit:g}), at prompt {comparison.prompt_id}, response token "
        f"{comparison.token} (engine {comparison.engine:.4f}, trainer {comparison.trainer:.4f}). "
        f"The usual suspects: {SUSPECTS}. log_prob_check.enabled=false trains all the same"
    )
