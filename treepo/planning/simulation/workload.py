"""The workload of a planned step: the policy's own settings, on prompts and answers of assumed lengths.

Departures from a real run. Units: tokens.

- No answer loops, so the repetition stop is off. Log-probs are random.
- Boxes count only if the fallback distinguishes boxed from other finished answers; then all are boxed.
- Prompts that `learning.dynamic_sampling` would sample in place of others are not sampled.
"""

from dataclasses import dataclass, replace

import numpy as np

from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.planning.simulation.lengths import DrawnEnds, ForcedLengths, LogNormal, random_prompts
from treepo.protocols import Sampler
from treepo.tree import Tree

_BOX = 1 << 20  # a token that no engine draws
_VOCABULARY = 1 << 16
_ORDERS_BY_BOX = ("finished", "boxed_long")


@dataclass(frozen=True, slots=True)
class Workload:
    """prompts: of one step."""

    sampling: SamplingConfig
    lengths: LogNormal
    prompt_tokens: int
    prompts: int
    seed: int

    def some_prompts(self, count: int) -> list[Prompt]:
        return random_prompts(count, self.prompt_tokens, _VOCABULARY)

    def engine(self, engine: Sampler) -> ForcedLengths:
        """`engine` with answers of these lengths."""
        return ForcedLengths(engine, DrawnEnds(self.lengths), last_token=_BOX)


def text_of(tokens: np.ndarray) -> str:
    """The stop rules' text: a box if an answer ends, nothing otherwise."""
    return "\\boxed{0}" if _BOX in tokens else ""


def half_correct(tree: Tree) -> Tree:
    """The tree with every other leaf graded as correct, and the rest as wrong."""
    leaves = (replace(leaf, reward=float(index % 2)) for index, leaf in enumerate(tree.leaves))
    return replace(tree, leaves=tuple(leaves))


def workload(config: RunConfig) -> Workload:
    """Lengths as the section `plan` says, by default half of what is allowed."""
    sampling, plan = config.sampling.without_rewards(), config.plan
    stops = sampling.stops
    quiet = stops.model_copy(
        update={
            "repetition": stops.repetition.model_copy(update={"check": "off"}),
            "boxed": stops.boxed if sampling.fallback.order in _ORDERS_BY_BOX else "off",
        }
    )
    return Workload(
        sampling=sampling.model_copy(update={"stops": quiet}),
        lengths=LogNormal(plan.response_tokens or sampling.max_response_tokens / 2, plan.response_sigma),
        prompt_tokens=plan.prompt_tokens or max(1, config.data.max_prompt_tokens // 2),
        prompts=config.data.prompts_per_step,
        seed=config.seed,
    )
