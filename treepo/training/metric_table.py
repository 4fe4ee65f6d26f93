"""What each metric of a run means, and what is healthy; also writes the table of docs/metrics.md.

    python -m treepo.training.metric_table docs/metrics.md

Lengths and tokens are response tokens. A share of trained tokens counts a token once for each trajectory that
shares it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"

METRICS: Mapping[str, tuple[str, str]] = {
    # Rewards and answers
    "reward": ("mean reward of the graded leaves, without terms", "rises"),
    "reward_with_terms": ("the same with the terms of `reward.terms`", "rises"),
    "term/*": ("mean of a term of the reward, weight included", ""),
    "grader/*": ("mean of a further number that your reward function returned", ""),
    "accuracy": ("share of the graded leaves that are correct; long answers have more leaves", "rises"),
    "heldout/accuracy": (
        "accuracy on the held-out prompts after this step; step 0: before training",
        "rises by more than two standard errors",
    ),
    "heldout/standard_error": ("standard error of `heldout/accuracy` over prompts", "below 0.02"),
    "heldout/response_tokens": ("mean tokens of a response to a held-out prompt", "steady"),
    "heldout/no_answer": ("share of the responses to held-out prompts without an answer", "below 0.1"),
    "heldout/truncated": ("share of these responses cut off at their most tokens", "below 0.1"),
    "heldout/*": (
        "the same five numbers of each set in `evaluation.sets`: `heldout/NAME/accuracy` and so on",
        "",
    ),
    "heldout/best_step": (
        "the step with the highest accuracy so far, whose checkpoint is kept (`evaluation.best`)",
        "one of the last",
    ),
    "reward_of/*": ("`reward` of one file of a mixture; absent in a step without its prompts", "rises"),
    "accuracy_of/*": ("`accuracy` of one file of a mixture; absent likewise", "rises"),
    "prompts_of/*": ("share of the step's prompts that are of one file of a mixture", "near its weight"),
    "verdict/correct": ("share of the leaves that are correct", "rises"),
    "verdict/wrong": ("share of the leaves that are wrong", "falls"),
    "verdict/no_answer": (
        "share of the leaves without an answer to grade",
        "below 0.1 after the first steps",
    ),
    "verdict/timeout": ("share of the leaves whose grading took too long; masked", "0"),
    "verdict/error": ("share of the leaves whose grading failed; masked", "0"),
    "leaves": ("leaves of the step's trees", "trees × `sampling.width`"),
    "leaves_ungraded": ("leaves without a grade; masked", "0"),
    # Trees
    "response_tokens": ("mean tokens of a response", "steady; not at `sampling.max_response_tokens`"),
    "tree_depth": ("mean segments on a response's path", ""),
    "tokens_unique": ("tokens in all trees, a shared one once", ""),
    "tokens_total": ("tokens of all responses; as many as independent samples would decode", ""),
    "total_over_unique": ("what sharing saves: `tokens_total` / `tokens_unique`", "above 1.2"),
    "trees/informative": ("share of the trees with two different rewards; only those teach", "0.2 to 0.9"),
    "trees/trained": ("trees that the step learned from", "`data.prompts_per_step`"),
    "stop/boxed": ("share of the leaves that ended with a boxed answer", "with `stop/eos`: near 1"),
    "stop/eos": ("share of the leaves that ended with the end token", "with `stop/boxed`: near 1"),
    "stop/limit": ("share of the leaves cut off at `sampling.max_response_tokens`", "below 0.1"),
    "stop/depth": ("share of the leaves cut off at `sampling.max_depth`", "below 0.1"),
    "stop/repetition": ("share of the leaves that repeated themselves", "below 0.05"),
    "dropped/equal": ("trees dropped because all rewards were equal (dynamic sampling)", "below half"),
    "dropped/ungraded": ("trees dropped because fewer than two leaves had a grade", "0"),
    # Engines
    "rollout/decoded_tokens": ("tokens that the engines decoded since the last step", ""),
    "rollout/tokens_per_second": ("the same per second of sampling", "steady"),
    "rollout/cached_token_ratio": ("share of the shared prefixes found in the prefix cache", "above 0.95"),
    "rollout/requests": ("requests answered", ""),
    "rollout/failed_requests": ("requests that failed and were sent again", "0"),
    "rollout/interrupted_requests": ("requests that a weight sync interrupted", ""),
    "rollout/failed_trees": ("trees given up after failed requests; other prompts replaced them", "0"),
    "rollout/branchings": ("paths that got more than one child", ""),
    "rollout/fallbacks": (
        "times that a tree ended early and went on from a cut",
        "few beside the branchings",
    ),
    "rollout/pruned_tokens": (
        "decoded tokens of children that a lookahead gave up",
        "few beside the decoded",
    ),
    # Asynchrony
    "staleness/mean": ("weight versions between a tree's first and the one that trains it", "small"),
    "staleness/max": ("the largest of the step", "at most `loop.max_staleness`"),
    "trees/growing": ("trees that are still sampled", ""),
    "trees/ready": ("graded trees that wait for a step", ""),
    "idle/engines": ("share of the engines' time without a request", "asynchronous: near 0"),
    "idle/trainer": ("share of the step in which the trainer waited for trees", "asynchronous: near 0"),
    # Trainer against engines
    "logprob_difference_mean": (
        "mean distance of the trainer's log-probs from the engine's, in nats; staleness adds to it",
        "float32: below 1e-5; bfloat16: below 0.05; steady",
    ),
    "logprob_difference_max": ("the largest of these distances", "steady"),
    "routing/own_choice_differs": (
        "share of (token, layer) pairs whose router would have chosen other experts than were replayed "
        "(`trainer.routing_replay`): before the first optimizer step with `rollout`, while training with "
        "`trainer`",
        "steady; `rollout`: near 0 in float32, about 0.1 in bfloat16; `trainer`: near 0",
    ),
    # Learning
    "train/optimizer_steps": ("optimizer steps taken", "`learning.mini_batches`"),
    "train/skipped_steps": ("optimizer steps skipped because the gradient was not finite", "0"),
    "train/loss": ("the loss; its level means little", "finite"),
    "train/unique_tokens": ("packed tokens trained in an optimizer step", ""),
    "train/clip_high": ("share of the trained tokens clipped above", "below 0.1"),
    "train/clip_low": ("share of the trained tokens clipped below", "below 0.1"),
    "train/dual_clip": ("share of the trained tokens clipped by the dual clip", "near 0"),
    "train/old_kl": ("KL from the policy before the step to the one after it, per token", "below 0.05"),
    "train/ratio_max": ("largest probability ratio of a step's update", "below 10"),
    "train/ratio_min": ("smallest probability ratio of a step's update", "above 0.1"),
    "train/importance": ("mean ratio of the trainer's probabilities to the engine's", "near 1"),
    "train/importance_max": ("largest of these ratios", "steady"),
    "train/importance_min": ("smallest of these ratios", "steady"),
    "train/importance_above": ("share of the tokens whose ratio is above the bound", "below 0.05"),
    "train/importance_below": ("share of the tokens whose ratio is below the bound", "below 0.05"),
    "train/importance_weight": ("mean importance weight of a token", "near 1"),
    "train/effective_sample_share": ("share of the batch that the weights leave effective", "above 0.9"),
    "train/entropy": ("mean entropy of the predictions, in nats", "falls slowly, not to 0"),
    "train/reference_kl": ("KL to the reference model, per token", "steady"),
    "train/grad_norm": ("norm of the gradient before clipping", "steady"),
    "train/learning_rate": ("the learning rate", "as configured"),
    # Time
    "seconds/sample": ("the trainer waited for trees", ""),
    "seconds/log_probs": ("log-probs of the step's trees", ""),
    "seconds/train": ("forward and backward passes, optimizer", ""),
    "seconds/weight_sync": ("new weights to all engines", "short beside the step"),
    "seconds/step": ("from the end of one step to the end of the next", "steady"),
    "trainer_restarts": ("restarts of a lost trainer so far", "0"),
}
"""By name, `*` for any: what it means, and what is healthy in a run that learns."""


def meaning(name: str) -> tuple[str, str] | None:
    """What a metric means and what is healthy; None for a name that no run writes."""
    return METRICS.get(name) or METRICS.get(f"{name.partition('/')[0]}/*")


def table() -> str:
    """The table in Markdown, between its marks."""
    rows = [f"| `{name}` | {text} | {healthy} |" for name, (text, healthy) in METRICS.items()]
    return "\n".join([BEGIN, "| metric | meaning | healthy |", "| --- | --- | --- |", *rows, END])


def renewed(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
