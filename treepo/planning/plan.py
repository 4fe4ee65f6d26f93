"""A run's memory and speed, worked out without a GPU; if it does not fit, the nearest layouts that do."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bridge.architecture import check_routing_replay
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.planning.architecture import planned_architecture
from treepo.planning.fit import Fit, fit
from treepo.planning.layouts import Neighbour, neighbours
from treepo.planning.memory.parts import Memory
from treepo.planning.memory.trainer import checkpoint_bytes, parameter_count
from treepo.planning.memory.weight_sync import exported_bytes
from treepo.planning.speed.loop import loop_time, steps_overlap
from treepo.planning.speed.sampling import Sampling, simulate
from treepo.planning.speed.step import StepTime, step_time, trainer_phases
from treepo.preflight.model_folder import check_present_parts

_PROPOSALS = 3
_SEARCH_SECONDS = 20.0
_SAMPLED = ("seconds", "decoded_tokens", "leaf_tokens", "mean_batch", "peak_tokens")  # all but the trees


@dataclass(frozen=True, slots=True)
class Proposal:
    """Another layout of the same run that fits. fullest: its limit nearest to being reached, in words."""

    overrides: tuple[str, ...]
    fullest: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `treepo plan` shows.

    architecture: the folder whose config.json was read. checkpoint, exported: bytes of a training checkpoint
    and of a Hugging Face folder. sampling, step: None if the run does not fit. proposals: only then, as many
    as were found.
    """

    config: RunConfig
    architecture: Path
    parameters: int
    fit: Fit
    checkpoint: float
    exported: float
    sampling: Sampling | None
    step: StepTime | None
    proposals: tuple[Proposal, ...]


def make_plan(config: RunConfig, report: Callable[[str], None]) -> Plan:
    """Plans within a minute. report: told the work in progress. Raises ConfigError or ModelError."""
    folder = model_folder(config)
    check_present_parts(folder)
    check_routing_replay(folder, planned_architecture(folder), config.trainer.routing_replay)
    report("build the model without memory")
    fitted = fit(config, folder)
    sampling = step = None
    proposals: tuple[Proposal, ...] = ()
    if fitted.problem is None:
        report("sample a step on simulated engines")
        sampling = simulate(config, folder, fitted.engine)
        phases = trainer_phases(config, folder, sampling.trees)
        loop = None
        if steps_overlap(config):
            report("run the loop on simulated engines")
            loop = loop_time(config, folder, fitted.engine, sampling.trees, phases)
        step = step_time(phases, sampling, loop)
    else:
        report("look for layouts that fit")
        proposals = tuple(_proposals(config, folder))
    return Plan(
        config,
        folder,
        parameter_count(folder),
        fitted,
        checkpoint_bytes(config, folder),
        exported_bytes(config, folder),
        sampling,
        step,
        proposals,
    )


def model_folder(config: RunConfig) -> Path:
    """The folder whose config.json a plan reads. Raises ConfigError if neither path has one."""
    if (config.model.path / "config.json").is_file():
        return config.model.path
    architecture = config.plan.architecture
    if architecture is None:
        raise ConfigError(
            f"model.path: {config.model.path} has no config.json; download the model, or name a folder with "
            "its config.json in plan.architecture"
        )
    if not (architecture / "config.json").is_file():
        raise ConfigError(f"plan.architecture: {architecture} has no config.json")
    return architecture


def _proposals(config: RunConfig, folder: Path) -> Iterator[Proposal]:
    """The nearest layouts that fit, none of which changes all that another changes."""
    found: list[Neighbour] = []
    deadline = time.monotonic() + _SEARCH_SECONDS
    for neighbour in neighbours(config, planned_architecture(folder)):
        if len(found) == _PROPOSALS or time.monotonic() > deadline:
            return
        if any(neighbour.goes_beyond(other) for other in found):
            continue
        fitted = fit(neighbour.config, folder)
        if fitted.problem is None:
            found.append(neighbour)
            yield Proposal(tuple(neighbour.overrides), str(fitted.fullest))


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as one document, in bytes and seconds."""
    fitted, engine, sampling, step = plan.fit, plan.fit.engine, plan.sampling, plan.step
    return {
        "fits": fitted.problem is None,
        "problem": fitted.problem,
        "proposals": [list(proposal.overrides) for proposal in plan.proposals],
        "architecture": str(plan.architecture),
        "parameters": plan.parameters,
        "device": asdict(fitted.device),
        "devices": fitted.footprint.devices,
        "nodes": fitted.footprint.nodes,
        "trainer": [_memory(memory) for memory in fitted.trainer],
        "engine": _memory(engine.memory)
        | {
            "kv_tokens": engine.kv_tokens,
            "expected_tree_tokens": engine.expected_tree,
            "longest_tree_tokens": engine.longest_tree,
            "expected_trees": engine.expected_trees,
        },
        "host": _memory(fitted.host),
        "limits": [asdict(limit) for limit in fitted.limits],
        "checkpoint_bytes": plan.checkpoint,
        "exported_bytes": plan.exported,
        "sampling": sampling and {name: getattr(sampling, name) for name in _SAMPLED},
        "step": step
        and {
            "seconds": step.seconds,
            "tokens_per_second": step.tokens_per_second,
            "engines_idle": step.engines_idle,
            "trainer_idle": step.trainer_idle,
            "phases": {name: asdict(phase) for name, phase in step.phases.items()},
        },
        "assumed": plan.config.plan.model_dump(mode="json"),
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return {"owner": memory.owner, "total": memory.total, "parts": memory.parts, "notes": memory.notes}
