"""The loop's settings in virtual time: the paper's 7B run on 64 and 512 GPUs, at the rates of `treepo plan`.

Real are the scheduler, the tree supply, the driver, the router and the trees; engines and trainer only take
their time, and grading takes none. Answers' lengths are log-normal with a long tail. Dynamic sampling drops
none of the trees, or a share of them that is drawn. Every setting has the same prompts a step, and the layout
on its GPUs that is fastest in a short search: the engines' tensor parallelism and, for `async`, the trainer's
GPUs. A share of the engines is simulated with its share of the prompts, with the whole time of the trainer.

- `sync`: `placement: colocated`; engines and trainer take turns on all GPUs.
- `oversample`: the same, with `sampling.oversample: 1.5`.
- `async-N`: `placement: split`, `loop.max_staleness: N`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.planning.fit import Fit, fit
from treepo.planning.plan import model_folder
from treepo.planning.simulation.loop import LoopTime, SimulatedGrading
from treepo.planning.simulation.workload import workload
from treepo.planning.speed.device_rates import planned_rates
from treepo.planning.speed.loop import simulate_share
from treepo.planning.speed.sampling import simulate_step
from treepo.planning.speed.step import Phase, sync_weights, trainer_phases

PAPER = Path("examples/paper/treepo-qwen2.5-7b.yaml")
SIGMA = 1.0
SETTINGS: Mapping[str, Sequence[str]] = {
    "sync": (),
    "oversample": ("sampling.oversample=1.5",),
    "async-1": ("loop.mode=async", "loop.max_staleness=1"),
    "async-2": ("loop.mode=async", "loop.max_staleness=2"),
    "async-4": ("loop.mode=async", "loop.max_staleness=4"),
}
_TENSOR = 4  # of the trainer; the most that the model's key-value heads allow
_SEARCH_PROMPTS, _SEARCH_STEPS = 32, 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout of a setting. phases: of its trainer. gpus: of the trainer and of the engines."""

    config: RunConfig
    fit: Fit
    phases: Mapping[str, Phase]
    gpus: tuple[int, int]

    @property
    def learning(self) -> float:
        """Seconds that no overlap can hide: of the trainer, and of the weight sync."""
        return sum(phase.seconds for phase in self.phases.values())


class Benchmark:
    """trees: of one step, for the trainer's time."""

    def __init__(self, base: Sequence[str], prompts: int, steps: int) -> None:
        self._base, self._prompts, self._steps = base, prompts, steps
        self._layouts: dict[tuple[str, int], list[Candidate]] = {}
        self._phases: dict[str, Mapping[str, Phase]] = {}
        config = load_config(PAPER, base)
        self._replicas = config.data.prompts_per_step // config.learning.mini_batches
        self._folder = model_folder(config)
        engine = fit(config, self._folder).engine
        rates = planned_rates(config, self._folder, engine)
        self._trees = simulate_step(workload(config), rates, engine, config.engine.count).trees

    def best(self, setting: str, gpus: int, equal: float) -> Candidate:
        """The layout with the fastest steps in a short simulation."""
        best, seconds = None, float("inf")
        if (setting, gpus) not in self._layouts:
            self._layouts[setting, gpus] = list(self._candidates(setting, gpus))
        for candidate in sorted(self._layouts[setting, gpus], key=lambda each: each.learning):
            if candidate.config.loop.mode == "async" and candidate.learning >= seconds:
                continue
            prompts = min(_SEARCH_PROMPTS, self._prompts)
            time = self._simulate(candidate, candidate.config.seed, equal, prompts, _SEARCH_STEPS)
            if time.seconds < seconds:
                best, seconds = candidate, time.seconds
        assert best is not None, f"{setting} fits on no layout of {gpus} GPUs"
        return best

    def simulate(self, candidate: Candidate, seed: int, equal: float) -> LoopTime:
        """equal: share of the trees that are dropped."""
        return self._simulate(candidate, seed, equal, self._prompts, self._steps)

    def _simulate(self, candidate: Candidate, seed: int, equal: float, prompts: int, steps: int) -> LoopTime:
        config, engine = candidate.config.model_copy(update={"seed": seed}), candidate.fit.engine
        rates = planned_rates(config, self._folder, engine)
        load = workload(config)
        grading = SimulatedGrading(equal=equal)
        return simulate_share(
            config, load, rates, engine, self._trees, candidate.phases, prompts, steps, grading
        )

    def _candidates(self, setting: str, gpus: int) -> Iterator[Candidate]:
        """Layouts that fit, each with the fastest recomputation that fits."""
        for (trainer, engines), tensor in product(splits(setting, gpus, self._replicas), (1, 2, 4)):
            overrides = [
                *self._base,
                *SETTINGS[setting],
                *layout(setting, trainer, self._replicas),
                f"engine.tensor={tensor}",
                f"engine.count={engines // tensor}",
            ]
            for recompute in ("none", "selective", "full"):
                config = load_config(PAPER, [*overrides, f"trainer.recompute={recompute}"])
                fitted = fit(config, self._folder)
                if fitted.problem is None:
                    yield Candidate(config, fitted, self._trainer(config), (trainer, engines))
                    break

    def _trainer(self, config: RunConfig) -> Mapping[str, Phase]:
        """The phases of the trainer, of which only the weight sync depends on the engines."""
        key = config.trainer.model_dump_json()
        if key not in self._phases:
            self._phases[key] = trainer_phases(config, self._folder, self._trees)
        return {**self._phases[key], "weight_sync": sync_weights(config, self._folder)}


def splits(setting: str, gpus: int, replicas: int) -> Iterator[tuple[int, int]]:
    """GPUs of the trainer and of the engines. replicas: the most that the trainer can have."""
    if not setting.startswith("async"):
        yield gpus, gpus
        return
    trainer = _TENSOR
    while trainer <= min(gpus // 2, _TENSOR * replicas):
        yield trainer, gpus - trainer
        trainer *= 2


def layout(setting: str, trainer: int, replicas: int) -> list[str]:
    """Overrides for a trainer on `trainer` GPUs: replicas first, then pipeline stages."""
    data = min(trainer // _TENSOR, replicas)
    parallel = [
        f"trainer.parallel.tensor={_TENSOR}",
        f"trainer.parallel.data={data}",
        f"trainer.parallel.pipeline={trainer // _TENSOR // data}",
    ]
    if setting.startswith("async"):
        return [*parallel, "placement=split", "weights.transport=broadcast"]
    return parallel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--simulated")
    group.add_argument("--gpus", type=int, nargs="+", default=[64, 512])
    group.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    group.add_argument("--prompts", type=int, default=64, help="of a simulated step")
    group.add_argument("--steps", type=int, default=4, help="that are measured")
    group.add_argument("--seeds", type=int, default=3)
    group.add_argument("--dropped", type=float, nargs="+", default=[0.0, 0.33], help="shares of the trees")
    group.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE")


def lines(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line a setting; ratios are over `sync` with the same seed, GPUs and dropped trees."""
    base = [f"plan.response_sigma={SIGMA}", *arguments.override]
    benchmark = Benchmark(base, arguments.prompts, arguments.steps)
    for gpus, dropped in product(arguments.gpus, arguments.dropped):
        sync: list[LoopTime] = []
        for setting in dict.fromkeys(["sync", *arguments.only]):
            candidate = benchmark.best(setting, gpus, dropped)
            times = [benchmark.simulate(candidate, seed, dropped) for seed in range(1, arguments.seeds + 1)]
            sync = sync or times
            yield {
                "setting": setting,
                "gpus": gpus,
                "dropped": dropped,
                **figures(candidate, gpus, times, sync),
                **conditions(candidate, arguments),
            }


def figures(
    candidate: Candidate, gpus: int, times: Sequence[LoopTime], sync: Sequence[LoopTime]
) -> dict[str, Any]:
    """Medians over seeds. An idle GPU computes nothing; GPUs that sync weights count as idle."""
    ratios = [other.seconds / time.seconds for time, other in zip(times, sync, strict=True)]
    trainer, engines = candidate.gpus
    busy = [(engines * time.sampling + trainer * time.learning) / time.seconds / gpus for time in times]
    return {
        "over_sync": median(ratios),
        "over_sync_range": [min(ratios), max(ratios)],
        "steps_per_hour": median(3600 / time.seconds for time in times),
        "gpus_idle": 1 - median(busy),
        "engines_idle": median(time.engines_idle for time in times),
        "trainer_idle": median(time.trainer_idle for time in times),
        "staleness": median(time.staleness for time in times),
        "max_staleness": max(time.max_staleness for time in times),
        "interrupted": median(time.interrupted for time in times),
        "seconds": median(time.seconds for time in times),
        "sampling_seconds": median(time.sampling for time in times),
        "learning_seconds": median(time.learning for time in times),
        "sync_seconds": candidate.phases["weight_sync"].seconds,
    }


def conditions(candidate: Candidate, arguments: argparse.Namespace) -> dict[str, Any]:
    config, parallel = candidate.config, candidate.config.trainer.parallel
    prompts, engines = config.data.prompts_per_step, config.engine.count
    simulated = max(1, min(engines, engines * arguments.prompts // prompts))
    return {
        "trainer_gpus": candidate.gpus[0],
        "engine_gpus": candidate.gpus[1],
        "trainer": f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data}",
        "recompute": config.trainer.recompute,
        "engines": engines,
        "engine_tensor": config.engine.tensor,
        "placement": config.placement,
        "weights": config.weights.transport,
        "prompts": prompts,
        "mini_batches": config.learning.mini_batches,
        "simulated_engines": simulated,
        "simulated_share": simulated / engines,
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "mean_response_tokens": config.plan.response_tokens,
        "response_sigma": config.plan.response_sigma,
        "device": config.plan.device,
    }
