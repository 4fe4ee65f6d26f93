"""One run: an arm on a task from a seed, with real processes, by `treepo train`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import CONFIG, TASKS, overrides
from benchmarks.training_run import train
from treepo.toy.make import make_toy

_PHASES = ("seconds/sample", "seconds/log_probs", "seconds/train", "seconds/weight_sync")


@dataclass(frozen=True, slots=True)
class Point:
    """An evaluation after `step` optimizer steps.

    decoded_tokens, trained_tokens (of responses, a shared one once), seconds: of training so far, evaluations
    left out. accuracy: of independent answers to held-out problems, with its standard error over problems.
    mixed: share of the trees whose rewards differ, mean over the steps so far; null before training.
    """

    task: str
    arm: str
    seed: int
    step: int
    decoded_tokens: int
    trained_tokens: int
    seconds: float
    accuracy: float
    standard_error: float
    mixed: float | None


def run(task: str, arm: str, seed: int, starts: Path, more: Sequence[str] = ()) -> list[Point]:
    """Train once, and return its evaluations. more: further overrides."""
    settings = TASKS[task]
    start = make_toy(starts / task, recipe=settings.starting, task=settings.module)
    files = (f"model.path={start.model}", f"data.train={start.train}", f"data.heldout={start.heldout}")
    lines, _ = train(CONFIG, [f"seed={seed}", *files, *overrides(task, arm), *more])
    return list(points(task, arm, seed, lines))


def points(task: str, arm: str, seed: int, lines: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """The evaluations in the lines of a run's metrics.jsonl, in their order."""
    steps: list[Mapping[str, Any]] = []
    for line in lines:
        if "seconds/step" in line:
            steps.append(line)
        if "heldout/accuracy" in line:
            mixed = [step["trees/informative"] for step in steps]
            yield Point(
                task=task,
                arm=arm,
                seed=seed,
                step=len(steps),
                decoded_tokens=sum(round(step["rollout/decoded_tokens"]) for step in steps),
                trained_tokens=sum(round(step.get("train/unique_tokens", 0)) for step in steps),
                seconds=round(sum(step[phase] for step in steps for phase in _PHASES), 2),
                accuracy=round(line["heldout/accuracy"], 5),
                standard_error=round(line["heldout/standard_error"], 5),
                mixed=round(sum(mixed) / len(mixed), 4) if mixed else None,
            )
