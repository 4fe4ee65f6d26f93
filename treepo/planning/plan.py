"""What a run will need and how fast it will be, without a GPU; and where it does not fit, what would."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bridge.architecture import read_architecture
from treepo.config.run import RunConfig
from treepo.planning.fit import Fit, fit
from treepo.planning.layouts import Neighbour, neighbours
from treepo.planning.memory import Memory
from treepo.planning.model import model_folder
from treepo.planning.sampling import Sampling, simulate
from treepo.planning.step import StepTime, step_time
from treepo.planning.trainer import parameters
from treepo.planning.trainer_host import checkpoint_bytes
from treepo.planning.update_memory import exported_bytes

_PROPOSALS = 3
_SEARCH_SECONDS = 20.0
_SAMPLED = ("seconds", "decoded_tokens", "leaf_tokens", "mean_batch", "peak_tokens")  # the trees left out


@dataclass(frozen=True, slots=True)
class Proposal:
    """Another layout of the same run that fits. fullest: the limit that it comes nearest to, in words."""

    overrides: tuple[str, ...]
    fullest: str


@dataclass(frozen=True, slots=True)
class Plan:
    """architecture: the folder whose config.json was read. checkpoint, exported: bytes of a training
    checkpoint and of a Hugging Face folder. sampling, step: None where the run does not fit: it has no speed
    then. proposals: only then, as many as were found.
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


def make_plan(config: RunConfig, doing: Callable[[str], None]) -> Plan:
    """Within a minute. doing: told what is being worked out. Raises ConfigError, ModelError."""
    folder = model_folder(config)
    doing("build the model without memory")
    fitted = fit(config, folder)
    sampling = step = None
    proposals: tuple[Proposal, ...] = ()
    if fitted.problem is None:
        doing("sample a step on simulated engines")
        sampling = simulate(config, folder, fitted.engine)
        step = step_time(config, folder, sampling)
    else:
        doing("look for layouts that fit")
        proposals = tuple(_proposals(config, folder))
    return Plan(
        config,
        folder,
        parameters(folder),
        fitted,
        checkpoint_bytes(config, folder),
        exported_bytes(config, folder),
        sampling,
        step,
        proposals,
    )


def _proposals(config: RunConfig, folder: Path) -> Iterator[Proposal]:
    """The nearest layouts that fit, none of which changes more than another does."""
    found: list[Neighbour] = []
    deadline = time.monotonic() + _SEARCH_SECONDS
    for neighbour in neighbours(config, read_architecture(folder)):
        if len(found) == _PROPOSALS or time.monotonic() > deadline:
            return
        if any(neighbour.goes_beyond(other) for other in found):
            continue
        fitted = fit(neighbour.config, folder)
        if fitted.problem is None:
            found.append(neighbour)
            yield Proposal(tuple(neighbour.overrides), str(fitted.fullest))


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as one document; bytes and seconds."""
    fitted, engine, sampling, step = plan.fit, plan.fit.engine, plan.sampling, plan.step
    return {
        "fits": fitted.problem is None,
        "problem": fitted.problem,
        "proposals": [list(proposal.overrides) for proposal in plan.proposals],
        "architecture": str(plan.architecture),
        "parameters": plan.parameters,
        "device": asdict(fitted.device),
        "devices": fitted.places.devices,
        "nodes": fitted.places.nodes,
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
            "phases": {name: asdict(phase) for name, phase in step.phases.items()},
        },
        "assumed": plan.config.plan.model_dump(mode="json"),
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return {"owner": memory.owner, "total": memory.total, "parts": memory.parts, "notes": memory.notes}
