"""What is compared: tasks, and arms, the ways of sampling and learning. A new arm is one line of ARMS.

**Equal tokens.** Every step of every arm decodes about `BUDGET` tokens. Both tasks' answers have one length
each, so the size of a tree follows from the sampling configuration alone: `tokens_a_tree` grows a few by the
driver, on an engine that writes answers of that length. A step has as many prompts as make up the budget, to
within half a tree (1 to 3%). Where rewards decide how large trees become, or which are dropped, `more` is
measured: change it until the summary's `tokens_a_step` agree. The budget holds on average, not step by step;
results are compared along the tokens that were in fact decoded.

**Equal steps.** All arms take the same number of optimizer steps, one a training step, with the same loss and
learning rate.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning import search, sums
from treepo.config.load import load_config
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.toy.recipe import Recipe
from treepo.toy.task import Task
from treepo.tree import Tree

CONFIG = "examples/quickstart.yaml"
WIDTH = 8
STEPS = 12
BASE = (
    f"steps={STEPS}",
    f"sampling.width={WIDTH}",
    "sampling.segment_tokens=8",
    "evaluation.every=4",
    "evaluation.samples=2",
    "checkpoint.every=null",
    "trainer.optimizer.warmup_steps=2",
)


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """A task. response_tokens: of an answer, its end token included. budget: decoded tokens of a step."""

    module: Task[Any]
    starting: Recipe
    response_tokens: int
    budget: int
    overrides: Sequence[str]


TASKS: Mapping[str, TaskSettings] = {
    "sums": TaskSettings(
        sums,
        sums.STARTING,
        response_tokens=75,
        budget=12 * WIDTH * 75,
        overrides=("sampling.max_depth=10", "sampling.max_response_tokens=80"),
    ),
    "search": TaskSettings(
        search,
        search.STARTING,
        response_tokens=33,
        budget=24 * WIDTH * 33,
        overrides=(
            "sampling.max_depth=5",
            "sampling.max_response_tokens=40",
            "reward.function=benchmarks.learning.search:reward",
            "data.columns.extra=extra_info",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """Overrides of the base. more: by task, decoded tokens for each tree that is trained, over those of
    `tokens_a_tree`; 1 if it is not there.
    """

    overrides: Sequence[str] = ()
    more: Mapping[str, float] = field(default_factory=dict)


_GRPO = "learning.estimator=grpo"
_SEQUENTIAL = ("sampling.mode=sequential", _GRPO)
_DYNAMIC = "learning.dynamic_sampling=true"
_PIVOTS = (
    "sampling.branching=1",
    "sampling.initial_branching=4",
    "sampling.fallback.order=wrong",
    "sampling.fallback.cut=pivot",
)
BASELINE = "grpo"
ARMS: Mapping[str, Arm] = {
    BASELINE: Arm(_SEQUENTIAL),
    "grpo-dynamic": Arm((*_SEQUENTIAL, _DYNAMIC), more={"sums": 1.07, "search": 1.25}),
    "treepo": Arm(),
    "treepo-segment": Arm(("learning.estimator=treepo_segment",)),
    "tree-grpo": Arm((_GRPO,)),
    "more-init": Arm(("sampling.initial_branching=4",)),
    "late": Arm(("sampling.branch.from_depth=2",)),
    "surprise": Arm(("sampling.branch.at=surprise",), more={"search": 1.08}),
    "pivots": Arm(_PIVOTS, more={"sums": 0.88, "search": 0.88}),
    "pivots-by-cut": Arm((*_PIVOTS, "learning.cut_baselines=true"), more={"sums": 0.88, "search": 0.88}),
    "width": Arm(("sampling.width=4-16", _DYNAMIC), more={"sums": 0.95, "search": 1.59}),
}


def overrides(task: str, arm: str) -> list[str]:
    """All overrides of CONFIG for an arm on a task, the number of prompts included."""
    chosen = sampled_as(task, arm)
    tokens = tokens_a_tree(task, arm) * ARMS[arm].more.get(task, 1.0)
    return [*chosen, f"data.prompts_per_step={round(TASKS[task].budget / tokens)}"]


def sampled_as(task: str, arm: str) -> list[str]:
    """The overrides of CONFIG for an arm on a task, without the number of prompts."""
    return [*BASE, *TASKS[task].overrides, *ARMS[arm].overrides]


@cache
def tokens_a_tree(task: str, arm: str) -> float:
    """Decoded tokens of an arm's mean tree, if all answers have the task's length."""
    sampling = load_config(Path(CONFIG), sampled_as(task, arm)).sampling
    return asyncio.run(_mean_tree(sampling.without_rewards(), TASKS[task].response_tokens))


async def _mean_tree(sampling: SamplingConfig, response_tokens: int, trees: int = 64) -> float:
    engine = _FixedLength(response_tokens)
    driver = TreeDriver([engine], sampling, lambda tokens: " " * len(tokens), seed=0)
    prompt = np.zeros(1, np.int32)
    prompts = [Prompt(id=str(i), text="", tokens=prompt, answer="", source="") for i in range(trees)]
    async for tree in driver.sample(prompts, step=1):
        assert isinstance(tree, Tree)
    return driver.stats.decoded_tokens / trees


class _FixedLength:
    """An engine whose answers end after `length` tokens."""

    def __init__(self, length: int) -> None:
        self._length = length

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        left = self._length - (len(request.context) - request.prompt_tokens)
        tokens = np.random.default_rng(request.seed).integers(0, 100, min(left, request.max_tokens), np.int32)
        finish = "eos" if len(tokens) == left else "length"
        return GenerateOutput(tokens, -tokens.astype(np.float32), version=0, finish=finish, cached_tokens=0)
