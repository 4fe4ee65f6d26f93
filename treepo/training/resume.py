"""`treepo train --resume`: finds the checkpoint to continue from, and refuses if it is not the same run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treepo.config.dotted import by_dotted_key
from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.data.inputs import TrainInputs
from treepo.data.output_folder import CONFIG, SUMMARY
from treepo.errors import ConfigError, ModelError
from treepo.protocols import Trainer, TrainingEnginePool
from treepo.training.checkpoint_manifest import MANIFEST, READY_TREES, read_manifest
from treepo.training.checkpoints import newest
from treepo.training.ready_trees import read_ready_trees
from treepo.training.run_state import RunState
from treepo.training.tree_supply import FinishedTree
from treepo.tree import Tree

# Sections and keys that determine the run's numbers, except FREE. All others may change: layout, engines,
# number of steps, and when trees start (`loop`).
FIXED = (
    "seed",
    "model",
    "data",
    "sampling",
    "learning",
    "trainer.optimizer",
    "trainer.lora",
    "evaluation",
    "reward.function",
    "reward.url",
    "reward.terms",
    "reward.overlong_buffer_tokens",
    "reward.correct",
    "reward.wrong",
)
FREE = (
    "sampling.oversample",
    # The way out of a run that diverged; the change is shown.
    "trainer.optimizer.learning_rate",
    "trainer.optimizer.warmup_steps",
    # They follow the number of steps, which may change.
    "trainer.optimizer.schedule",
    "trainer.optimizer.decay_steps",
    "trainer.optimizer.min_learning_rate",
)
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a run continues.

    checkpoint: its folder. ready_trees: finished trees that no step has taken or counted, by position.
    changes: keys whose value differs from the interrupted run's, one line each.
    """

    checkpoint: Path
    state: RunState
    ready_trees: Mapping[int, FinishedTree]
    changes: tuple[str, ...]


def find_resume(config: RunConfig, inputs: TrainInputs, *, contents: bool = True) -> Resume | None:
    """Find where the run in `config.out` continues; None if it has no checkpoint.

    contents: as in `newest`. Raises ConfigError if the run is finished, would not be the same run, or has
    ready trees without the routes that it replays; ModelError if its adapters belong to other weights.
    """
    found = newest(config.out, contents=contents)
    if found is None:
        return None
    checkpoint, state = found
    changes = differences(load_config(config.out / CONFIG), config)
    refused = [line for key, line in changes.items() if _is_fixed(key)]
    if refused:
        raise ConfigError(
            f"--resume: {config.out / CONFIG} has {'; '.join(refused)}; these keys cannot change "
            "during a run (another `out` begins a new one)"
        )
    names = ", ".join(str(file.path) for file in config.data.mixture) or str(config.data.train)
    if state.data != inputs.train.fingerprint:
        raise ConfigError(
            f"--resume: the prompts or answers in {names} have changed since {checkpoint} was written"
        )
    if config.trainer.lora is not None and (adapters := read_manifest(checkpoint).adapters) is not None:
        adapters.check_base(config.model.path, checkpoint)
    if state.steps_done > config.steps or (
        state.steps_done == config.steps and (config.out / SUMMARY).is_file()
    ):
        raise ConfigError(
            f"--resume: the run in {config.out} is complete after {state.steps_done} steps, "
            f"and steps = {config.steps}"
        )
    return _with_routes_of(config, _resume(config.out, checkpoint, state, tuple(changes.values())))


def last_checkpoint(config: RunConfig) -> Resume | None:
    """Find the checkpoint from which a run continues in this process; None if there is none."""
    found = newest(config.out)
    return None if found is None else _with_routes_of(config, _resume(config.out, *found, changes=()))


async def restore(resume: Resume, engines: TrainingEnginePool, trainer: Trainer) -> None:
    """Give trainer and engines the weights of the checkpoint.

    Raises ConfigError if `model.dtype: auto` is another type on these devices than on the checkpoint's.
    """
    dtype = read_manifest(resume.checkpoint).dtype
    if dtype != trainer.dtype:
        raise ConfigError(
            f"--resume: {resume.checkpoint} is of a run in {dtype}, and model.dtype = auto is "
            f"{trainer.dtype} on these devices; a run cannot change between CPUs and GPUs"
        )
    async with engines.training():
        await trainer.load(resume.checkpoint.resolve())
        await engines.sync_weights(resume.state.steps_done)


def _resume(out: Path, checkpoint: Path, state: RunState, changes: tuple[str, ...]) -> Resume:
    """Raises ConfigError or ModelError if files of the run, or the ready trees, do not fit the checkpoint."""
    _check_sizes(out, state)
    ready_trees = read_ready_trees(checkpoint / READY_TREES)
    named = sorted([*state.schedule.ready, *state.schedule.dropped])
    if sorted(ready_trees) != named:
        raise ModelError(
            f"{checkpoint / READY_TREES}: it has the trees {sorted(ready_trees)}, and {MANIFEST} names "
            f"{named}"
        )
    return Resume(checkpoint, state, ready_trees, changes)


def differences(saved: RunConfig, config: RunConfig) -> dict[str, str]:
    """Describe each changed key: "steps = 3, now 5". `out` may differ, because a run folder can be moved."""
    before, now = (by_dotted_key(each.model_dump(mode="json")) for each in (saved, config))
    keys = [key for key in before | now if key != "out" and before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    return {key: f"{key} = {_show(before, key)}, now {_show(now, key)}" for key in keys}


def _with_routes_of(config: RunConfig, resume: Resume) -> Resume:
    """The ready trees with routes if routes are replayed, otherwise without, as the trees to come.

    Raises ConfigError if routes are to be replayed, and ready trees were sampled without.
    """
    if config.trainer.routing_replay != "rollout":
        trees = {
            position: replace(finished, tree=_without_routes(finished.tree))
            for position, finished in resume.ready_trees.items()
        }
        return replace(resume, ready_trees=trees)
    lacking = sum(finished.tree.prompt_routes is None for finished in resume.ready_trees.values())
    if lacking:
        raise ConfigError(
            f"--resume: trainer.routing_replay = rollout, but {lacking} trees that wait for a step were "
            f"sampled without routes ({resume.checkpoint / READY_TREES}); none and trainer are allowed"
        )
    return resume


def _without_routes(tree: Tree) -> Tree:
    segments = tuple(replace(segment, routes=None) for segment in tree.segments)
    return replace(tree, segments=segments, prompt_routes=None)


def _check_sizes(out: Path, state: RunState) -> None:
    """Raise ConfigError if a file has shrunk since the checkpoint: it would lack trees of earlier steps."""
    for name, size in state.sizes.items():
        path = out / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise ConfigError(
                f"--resume: {path} has {found} bytes, but had {size} after step {state.steps_done}: "
                "it was changed"
            )


def _is_fixed(key: str) -> bool:
    return key not in FREE and any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def _show(values: Mapping[str, Any], key: str) -> str:
    """As YAML has it: null, true."""
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"
