"""The table of metrics has every metric that a run writes, and no other; docs/metrics.md shows it."""

import numpy as np
import torch

from tests.support.paths import ROOT
from tests.support.random_trees import random_tree
from treepo.config.learning import LearningConfig
from treepo.learning.dynamic_sampling import Dropped
from treepo.learning.loss import policy_loss, summarise
from treepo.learning.mismatch import LogProbMismatch
from treepo.protocols import BatchResult, WeightCheck
from treepo.rollout.stats import Stats
from treepo.training.metric_table import METRICS, meaning, renewed
from treepo.training.metrics import STEP_PHASES, file_metrics, heldout_metrics, step_metrics
from treepo.training.tree_supply import Batch, FinishedTree, Sampled
from treepo.tree import Leaf, Tree

ELSEWHERE = {"grad_norm", "learning_rate"}  # which the trainer adds to the metrics of the loss


def loss_metrics() -> dict[str, float]:
    """The metrics of the loss with everything switched on."""
    config = LearningConfig.model_validate(
        {"kl_coefficient": 0.1, "entropy_coefficient": 0.1, "importance": {"level": "token"}}
    )
    columns = ("advantage_pos", "advantage_neg", "count_pos", "count_neg")
    pack = {name: torch.ones(3) for name in (*columns, "rollout_log_prob", "reference_log_prob")}
    _, metrics = policy_loss(torch.ones(3), pack, config, 3.0, torch.ones(3))
    return summarise({name: float(value) for name, value in metrics.items()})


def tree_with_terms() -> Tree:
    tree = random_tree(np.random.default_rng(0), "a:1")
    leaves = [
        Leaf(leaf.segment, leaf.stop, 1.0, leaf.verdict, {"length": 0.5}, {"steps": 3.0})
        for leaf in tree.leaves
    ]
    return Tree(tree.prompt_id, tree.prompt, tree.segments, tuple(leaves))


def written() -> set[str]:
    """The names of all metrics of a step."""
    update = loss_metrics() | dict.fromkeys(ELSEWHERE, 0.0)
    finished = FinishedTree(tree_with_terms(), "1")
    batch = Batch([finished], [finished.tree], [0], dict.fromkeys(Dropped, 0))
    seconds = dict.fromkeys(STEP_PHASES, 1.0)
    result = BatchResult([update], LogProbMismatch(), {}, WeightCheck(1.0, -0.5, -0.5, 100), 0.1)
    metrics = step_metrics(batch, Sampled(Stats(), 0.0, 1.0, 0, 0), result, seconds, 4.0, 0)
    return {*metrics, *file_metrics([finished.tree], ["a"])}


def test_the_table_has_every_metric_that_a_run_writes_and_no_other() -> None:
    patterns = [name for name in METRICS if name.endswith("*")]
    heldout = {**heldout_metrics("heldout", [tree_with_terms()]), "heldout/best_step": 1}
    names = {
        next((pattern for pattern in patterns if name.startswith(pattern[:-1])), name) for name in written()
    } | {*heldout, "heldout/*"}
    assert names == set(METRICS)


def test_a_metric_of_your_own_has_the_meaning_of_its_kind() -> None:
    assert meaning("term/length") == METRICS["term/*"]
    assert meaning("reward") == METRICS["reward"]
    assert meaning("heldout/math/accuracy") == METRICS["heldout/*"]
    assert meaning("something") is None


def test_the_page_is_current() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert renewed(page) == page, "python -m treepo.training.metric_table docs/metrics.md"
