"""What must hold after a run, whatever happened to it. Each checker returns one line for each violation."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL = Path("checkpoint") / "model.safetensors"
_FINITE = ("train/loss", "train/grad_norm")
_UNFINISHED = ("*.part", "*.partial", ".step-*", "*.removed")


@dataclass(slots=True)
class History:
    """lost: trees that no step has trained. doubled: trees that were trained twice. faults: anything else."""

    lost: int = 0
    doubled: int = 0
    faults: list[str] = field(default_factory=list)


def check_trees(records: Sequence[tuple[int, str]], passed: Sequence[str], steps: int, batch: int) -> History:
    """Compare the trees of a finished run with what the schedule says.

    records: step and prompt of each tree in trees.jsonl. passed: the prompt of each position that the run's
    last checkpoint has behind it. batch: trees of a step.
    """
    history = History()
    taken, expected = Counter(prompt for _, prompt in records), Counter(passed)
    history.lost = (expected - taken).total()
    history.doubled = (taken - expected).total()
    of_step = Counter(step for step, _ in records)
    for step in range(1, steps + 1):
        if of_step[step] != batch:
            history.faults.append(f"step {step} has {of_step[step]} trees instead of {batch}")
    if strange := sorted(set(of_step) - set(range(1, steps + 1))):
        history.faults.append(f"trees of steps that the run does not have: {strange}")
    return history


def read_trees(run: Path) -> list[tuple[int, str]]:
    """Step and prompt of each tree of a run."""
    records = [json.loads(line) for line in (run / "trees.jsonl").read_bytes().splitlines()]
    return [(record["step"], record["prompt_id"]) for record in records]


def passed_prompts(run: Path, names: Sequence[str]) -> list[str]:
    """The prompts that the newest checkpoint of a run has behind it. names: of the prompts, by row."""
    from treepo.config.load import load_config
    from treepo.config.run import RunConfig
    from treepo.data.prompt_order import PromptOrder
    from treepo.training.checkpoints import newest

    config, found = load_config(run / "config.yaml"), newest(run)
    assert isinstance(config, RunConfig)
    if found is None:
        return []
    schedule, order = found[1].schedule, PromptOrder(len(names), config.seed)
    waiting = {*schedule.again, *schedule.ready, *schedule.dropped}
    return [names[order.index(each)] for each in range(schedule.cursor) if each not in waiting]


def check_metrics(lines: Sequence[dict[str, Any]], steps: int) -> list[str]:
    """Each step has one line, in order, and its numbers are finite."""
    steps_seen = [line["step"] for line in lines if "seconds/step" in line]
    faults = []
    if steps_seen != list(range(1, steps + 1)):
        faults.append(f"metrics.jsonl has the steps {steps_seen} instead of 1 to {steps}")
    for line in lines:
        numbers = {name: line[name] for name in _FINITE if name in line}
        faults += [
            f"step {line['step']}: {name} is {value}"
            for name, value in numbers.items()
            if value is None or not math.isfinite(value)
        ]
    return faults


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_weights(run: Path, start: Path, reference: Path | None) -> list[str]:
    """Compare a finished run's model with that of an undisturbed run; without one, with the model it began
    from: it must be finite and have changed everywhere.
    """
    import torch  # here: a case waits seconds for it on a busy machine
    from safetensors.torch import load_file

    found = load_file(run / MODEL)
    faults = [f"{name} is not finite" for name, tensor in found.items() if not torch.isfinite(tensor).all()]
    if reference is None:
        before = load_file(start / "model.safetensors")
        return faults + [
            f"{name} has not changed" for name in before if torch.equal(found[name], before[name])
        ]
    expected = load_file(reference / MODEL)
    if found.keys() != expected.keys():
        return [*faults, f"the tensors are {sorted(found)} instead of {sorted(expected)}"]
    differ = [name for name in expected if not torch.equal(found[name], expected[name])]
    if differ:
        largest = max((found[name] - expected[name]).abs().max().item() for name in differ)
        faults.append(
            f"{len(differ)} of {len(expected)} tensors differ from the undisturbed run's, "
            f"by up to {largest:.1e}"
        )
    return faults


def unfinished_files(run: Path) -> list[str]:
    """Files and folders in the run folder that something began to write or to remove."""
    found = {path for pattern in _UNFINISHED for path in run.rglob(pattern)}
    return sorted(path.relative_to(run).as_posix() for path in found)
