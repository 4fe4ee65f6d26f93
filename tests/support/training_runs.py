"""Training runs with fakes: their configuration, their start, and what their files say."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_trainer import FakePool, FakeTrainer, NamedEngine
from treepo.config.run import RunConfig
from treepo.data.inputs import TrainInputs
from treepo.preflight.inputs import read_train_inputs
from treepo.protocols import GenerateRequest
from treepo.rewards.grade import Grade, GradeItem
from treepo.training import train as module
from treepo.training.checkpoints import newest
from treepo.training.resume import find_resume
from treepo.training.scheduler import ScheduleState
from treepo.training.train import train
from treepo.tree import Tree, Verdict, from_json


class Seen:
    """A `Reporter`. events: where it notes evaluations."""

    def __init__(self, events: list[str] | None = None) -> None:
        self.phases: list[str] = []
        self.steps: list[int] = []
        self.accuracies: dict[int, float] = {}
        self._events = [] if events is None else events

    def phase(self, name: str, announce: bool = False) -> None:  # noqa: ARG002
        self.phases.append(name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        self.steps.append(step)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.accuracies[step] = metrics["heldout/accuracy"]
        self._events.append(f"evaluated {step}")


class LengthRewards:
    """Responses of even length are correct. verdict: of every response, if given."""

    def __init__(self, verdict: Verdict | None = None) -> None:
        self._verdict = verdict

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [self._grade(item) for item in items]

    def _grade(self, item: GradeItem) -> Grade:
        if self._verdict is not None:
            return Grade(None, self._verdict)
        right = len(item.response) % 2 == 0
        return Grade(float(right), Verdict.CORRECT if right else Verdict.WRONG)


def use_rewards(monkeypatch: pytest.MonkeyPatch, rewards: object) -> None:
    @asynccontextmanager
    async def opened(_: object) -> AsyncIterator[object]:
        yield rewards

    monkeypatch.setattr(module, "open_rewards", opened)


def config_of(folder: Path, out: Path, steps: int, **changes: Any) -> RunConfig:
    """A run on `folder`/problems.jsonl with 4 trees a step, of 4 leaves each."""
    data = {"train": str(folder / "problems.jsonl"), "heldout": str(folder / "problems.jsonl")}
    sampling = {"segment_tokens": 4, "max_depth": 4, "max_response_tokens": 16, "width": 4}
    return RunConfig.model_validate(
        {
            "out": str(out),
            "steps": steps,
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": data | {"prompts_per_step": 4, "max_prompt_tokens": 256} | changes.pop("data", {}),
            "sampling": sampling | {"retry_seconds": 0.0} | changes.pop("sampling", {}),
            "learning": {"mini_batches": 2},
            "checkpoint": {"every": 2},
        }
        | changes
    )


ASYNC = {"loop": {"mode": "async", "max_staleness": 1}, "placement": "split"}
VERY_ASYNC = {"loop": {"mode": "async", "max_staleness": 3}, "placement": "split"}
OVERSAMPLE = {"sampling": {"oversample": 2.0}}
NOTHING_UNAWAITED = pytest.mark.filterwarnings(
    "error::RuntimeWarning",
    "error:Exception ignored in. <coroutine:pytest.PytestUnraisableExceptionWarning",
)
ALONE = {"data": {"heldout": None}, "log_prob_check": {"enabled": False}}  # only training samples


def slow_engine(shuffle: int = 0, **changes: Any) -> NamedEngine:
    return NamedEngine(end=0.1, pace=3, shuffle=shuffle, **changes)


def slow_trainer(turns: int = 200) -> FakeTrainer:
    trainer = FakeTrainer()
    trainer.turns = turns
    return trainer


def prompts_of(requests: Sequence[GenerateRequest]) -> list[bytes]:
    """The prompt of each request."""
    return [request.context[: request.prompt_tokens].tobytes() for request in requests]


@dataclass
class Run:
    """One start of a run with fakes. `train` trains; the fakes note their calls in `events`.

    killed_after: the run is cancelled after so many turns of the event loop; None: it is not.
    """

    config: RunConfig
    resume: bool = False
    engine: NamedEngine = field(default_factory=lambda: NamedEngine(end=0.1))
    trainer: FakeTrainer = field(default_factory=FakeTrainer)
    killed_after: int | None = None
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = Seen(self.events)
        self.trainer.events = self.events

    def train(self) -> dict[str, Any]:
        """Train; returns the summary. Whatever happens, no task and no request is left."""
        config = self.config
        inputs = inputs_of(config)
        origin = find_resume(config, inputs) if self.resume else None
        return asyncio.run(self._alone(train(config, inputs, self.seen, self._start, origin)))

    async def _alone(self, training: Coroutine[None, None, dict[str, Any]]) -> dict[str, Any]:
        task = asyncio.create_task(training)
        for _ in range(self.killed_after or 0):
            await asyncio.sleep(0)
        if self.killed_after is not None:
            task.cancel()
        try:
            return await task
        finally:
            assert asyncio.all_tasks() <= {task, asyncio.current_task()}
            assert self.engine.running == 0

    @asynccontextmanager
    async def _start(self) -> AsyncIterator[tuple[FakePool, FakeTrainer]]:
        goes_on = self.config.loop.mode == "async"
        pool = FakePool(self.engine, self.events, sampling_goes_on=goes_on, trainer=self.trainer)
        yield pool, self.trainer
        self.events.append("end")


_inputs: dict[str, TrainInputs] = {}


def inputs_of(config: RunConfig) -> TrainInputs:
    """The inputs of a run, read once for each choice of data."""
    key = config.data.model_dump_json() + config.evaluation.model_dump_json()
    if key not in _inputs:
        _inputs[key] = read_train_inputs(config)
    return _inputs[key]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The metrics of each step; the lines of evaluations are left out."""
    return [line for line in lines(out / "metrics.jsonl") if "seconds/step" in line]


def trees_of(out: Path) -> list[tuple[int, Tree]]:
    """The trees of a run with their steps."""
    whole = (out / "trees.jsonl").read_bytes().splitlines()
    return [(json.loads(line)["step"], from_json(line)) for line in whole]


def versions_of(tree: Tree) -> list[int]:
    return sorted({int(version) for segment in tree.segments for version in segment.versions})


def saved_schedule(out: Path) -> ScheduleState:
    """The schedule of the newest checkpoint."""
    found = newest(out)
    assert found is not None
    return found[1].schedule


def check_every_prompt_was_taken_once(config: RunConfig) -> None:
    """Compare the trees of a finished run with the positions that its last checkpoint has passed."""
    state = saved_schedule(config.out)
    train = inputs_of(config).train
    ids, order = [prompt.id for prompt in train], train.order(config.seed)
    waiting = {*state.again, *state.ready, *state.dropped}
    passed = Counter(
        ids[order.index(position)] for position in range(state.cursor) if position not in waiting
    )
    taken = Counter(tree.prompt_id for _, tree in trees_of(config.out))
    failed = sum(int(line["rollout/failed_trees"]) for line in steps_of(config.out))
    assert taken <= passed, "a prompt was taken twice"
    assert passed.total() - taken.total() == failed, "a prompt was lost"
