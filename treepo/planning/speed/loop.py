"""Steps of a run in which trees of several steps grow at once, in virtual time.

Simulated is a share of the engines with its share of the prompts; the trainer takes its whole time for them.
If one engine alone has more prompts than the bound, all times are scaled to fewer prompts a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from treepo.config.run import RunConfig
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.simulation.loop import (
    AT_ONCE,
    LoopTime,
    SimulatedGrading,
    SimulatedTrainer,
    simulate_loop,
)
from treepo.planning.simulation.rates import Rates
from treepo.planning.simulation.workload import Workload, workload
from treepo.planning.speed.device_rates import planned_rates
from treepo.planning.speed.step import Phase
from treepo.tree import Tree

_MAX_PROMPTS = 64
_STEPS = 4


def steps_overlap(config: RunConfig) -> bool:
    """Whether trees of a later step may grow before a step is trained."""
    return config.loop.mode == "async" or config.sampling.oversample > 1


def loop_time(
    config: RunConfig,
    folder: Path,
    engine: EngineMemory,
    trees: Sequence[Tree],
    phases: Mapping[str, Phase],
) -> LoopTime:
    """Steps of `config` with the model in `folder`.

    trees: of a step, which the trainer needs `phases` for.
    """
    rates = planned_rates(config, folder, engine)
    return simulate_share(config, workload(config), rates, engine, trees, phases, _MAX_PROMPTS, _STEPS)


def simulate_share(
    config: RunConfig,
    load: Workload,
    rates: Rates,
    engine: EngineMemory,
    trees: Sequence[Tree],
    phases: Mapping[str, Phase],
    max_prompts: int,
    steps: int,
    grading: SimulatedGrading = AT_ONCE,
) -> LoopTime:
    """As `loop_time`, at any rates. max_prompts: of a simulated step, more only if they do not divide.

    Whole engines are left out first: all engines have the same number of prompts if they can.
    """
    prompts, engines = config.data.prompts_per_step, config.engine.count
    used_engines = max(1, min(engines, engines * max_prompts // prompts))
    used_prompts = max(1, min(round(prompts * used_engines / engines), max_prompts))
    slower = prompts * used_engines / engines / used_prompts  # than a step of the simulated prompts
    part = config.model_copy(
        update={
            "data": config.data.model_copy(update={"prompts_per_step": used_prompts}),
            "engine": config.engine.model_copy(update={"count": used_engines}),
        }
    )
    by_tokens = phases["log_probs"].seconds + phases["train"].seconds
    mean_tokens = fmean(tree.unique_tokens() for tree in trees)

    def learn(batch: Sequence[Tree]) -> float:
        tokens = sum(tree.unique_tokens() for tree in batch) / used_prompts
        return (by_tokens * tokens / mean_tokens + phases["optimizer"].seconds) / slower

    trainer = SimulatedTrainer(learn, phases["weight_sync"].seconds / slower)
    time = simulate_loop(part, load, rates, engine, trainer, steps, grading)
    return replace(
        time,
        seconds=time.seconds * slower,
        sampling=time.sampling * slower,
        learning=time.learning * slower,
        decoded_tokens=time.decoded_tokens * prompts / used_prompts,
        interrupted=time.interrupted * engines / used_engines,
    )
