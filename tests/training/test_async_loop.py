"""Trees that grow while the trainer learns, and trees that pause: overlap, versions, staleness, batches."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import log_probs_of
from tests.support.fake_trainer import FakeTrainer, NamedEngine
from tests.support.training_runs import (
    ALONE,
    ASYNC,
    NOTHING_UNAWAITED,
    OVERSAMPLE,
    VERY_ASYNC,
    LengthRewards,
    Run,
    check_every_prompt_was_taken_once,
    config_of,
    lines,
    prompts_of,
    slow_engine,
    slow_trainer,
    steps_of,
    trees_of,
    use_rewards,
    versions_of,
)
from treepo.protocols import BatchResult, GenerateRequest, MiniBatch
from treepo.rewards.grade import Grade, GradeItem
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree, Verdict

pytestmark = [pytest.mark.usefixtures("graded"), NOTHING_UNAWAITED]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The versions that each prompt's trees began with."""
    versions: dict[str, list[int]] = defaultdict(list)
    admit = TreeDriver.admit

    def noted(driver: TreeDriver, prompt: Any, step: int) -> Any:
        if step:  # 0: of an evaluation
            versions[prompt.id].append(step - 1)
        return admit(driver, prompt, step)

    monkeypatch.setattr(TreeDriver, "admit", noted)
    return versions


class WatchingTrainer(FakeTrainer):
    """during: for each step, the number of requests that the engine had while this trainer trained."""

    watched: NamedEngine

    def __init__(self) -> None:
        super().__init__()
        self.during: list[int] = []

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        before = len(self.watched.requests) - self.watched.running
        result = await super().train_batch(mini_batches, temperature)
        self.during.append(len(self.watched.requests) - before)
        return result


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_trees_grow_while_the_trainer_trains(folder: Path, tmp_path: Path, max_staleness: int) -> None:
    loop = {"loop": {"mode": "async", "max_staleness": max_staleness}, "placement": "split"}
    config = config_of(folder, tmp_path / "run", steps=6, **loop)
    engine, trainer = slow_engine(), WatchingTrainer()
    trainer.watched, trainer.turns = engine, 200
    Run(config, engine=engine, trainer=trainer).train()
    during = trainer.during
    assert all(during[:-max_staleness]), "the engine has requests in each training"
    assert not during[-1], "no tree grows for a step that does not come"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", ["async", "very async", "oversample"])
def test_every_token_is_of_a_version_that_is_allowed(
    folder: Path, tmp_path: Path, begun: dict[str, list[int]], mode: str, seed: int
) -> None:
    most = {"async": 1, "very async": 3, "oversample": 1}[mode]
    changes = {"async": ASYNC, "very async": VERY_ASYNC, "oversample": OVERSAMPLE}[mode]
    config = config_of(folder, tmp_path / "run", steps=7, **changes)
    Run(config, engine=slow_engine(seed), trainer=slow_trainer(60)).train()
    staleness: dict[int, list[int]] = defaultdict(list)
    for step, tree in trees_of(config.out):
        versions, began = versions_of(tree), begun[tree.prompt_id].pop(0)
        assert began <= versions[0] <= versions[-1] <= step - 1 <= began + most
        staleness[step].append(step - 1 - began)
        check_tree(tree)
    metrics = steps_of(config.out)
    for line in metrics:
        of_step = staleness[line["step"]]
        assert line["staleness/mean"] == float(np.mean(of_step))
        assert line["staleness/max"] == max(of_step)
    assert all(len(of_step) == 4 for of_step in staleness.values())
    assert max(line["staleness/max"] for line in metrics) == most
    check_every_prompt_was_taken_once(config)


class CountingRewards(LengthRewards):
    """Counts responses, and the most that were graded in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.graded = self.most_at_once = 0

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        self.graded += len(items)
        self.most_at_once = max(self.most_at_once, len(items))
        return await super().grade(items)


@pytest.mark.parametrize("changes", [{}, ASYNC], ids=["sync", "async"])
def test_responses_that_are_graded_while_their_tree_grows_are_not_graded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    rewards = CountingRewards()
    use_rewards(monkeypatch, rewards)
    sampling = {"fallback": {"order": "wrong", "cut": "pivot"}, "width": 16}
    config = config_of(folder, tmp_path / "run", steps=4, sampling=sampling, **ALONE, **changes)
    Run(config, engine=NamedEngine(end=0.3, pace=3, shuffle=0)).train()
    trees = [tree for _, tree in trees_of(config.out)]
    assert sum(cut.graded is not None for tree in trees for cut in tree.cuts) > 4
    for tree in trees:
        assert all(leaf.reward == float(leaf.verdict is Verdict.CORRECT) for leaf in tree.leaves)
    leaves = sum(len(tree.leaves) for tree in trees)
    # Asynchronous sampling runs ahead: trees of steps that do not come were graded too.
    assert rewards.graded == leaves if not changes else rewards.graded >= leaves
    assert rewards.most_at_once == 1


def check_tree(tree: Tree) -> None:
    """Each token was sampled after exactly the tokens above it; versions only rise along a path."""
    for leaf in tree.leaves:
        path = tree.path(leaf.segment)
        tokens = np.concatenate([tree.prompt, *(tree.segments[each].tokens for each in path)])
        log_probs = np.concatenate([tree.segments[each].log_probs for each in path])
        versions = np.concatenate([tree.segments[each].versions for each in path])
        assert np.array_equal(log_probs, log_probs_of(tokens)[len(tree.prompt) :])
        assert np.all(np.diff(versions) >= 0)


def test_trees_that_a_step_does_not_need_pause_and_are_trained_next(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", steps=6, **OVERSAMPLE)
    Run(config, engine=slow_engine()).train()
    grown_on = 0
    for step, tree in trees_of(config.out):
        versions = versions_of(tree)
        assert set(versions) <= {step - 2, step - 1}
        grown_on += len(versions) == 2
    assert grown_on, "else no tree has gone on under the next weights"
    assert sum(line["rollout/interrupted_requests"] for line in steps_of(config.out))
    check_every_prompt_was_taken_once(config)


def test_a_synchronous_run_starts_trees_only_while_it_waits_for_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in an evaluation either, though trees that wait for room get it then."""
    sampling = {"oversample": 2.0, "max_live_trees": 5}
    config = config_of(folder, tmp_path / "run", steps=9, sampling=sampling, evaluation={"every": 1})
    run = Run(config, engine=slow_engine(), trainer=slow_trainer())
    admit = TreeDriver.admit

    def noted(driver: TreeDriver, prompt: Any, step: int) -> Any:
        run.events.append("start" if step else "start held-out")
        return admit(driver, prompt, step)

    monkeypatch.setattr(TreeDriver, "admit", noted)
    run.train()
    events = [event for event in run.events if event != "start held-out"]
    for step in range(1, 9):
        first = events.index(f"sync {step}")
        around = ["hold", "train 2", f"sync {step}", "release", f"evaluated {step}"]
        assert events[first - 2 : first + 3] == around
    check_every_prompt_was_taken_once(config)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_synchronous_run_does_not_depend_on_delays(folder: Path, tmp_path: Path, dynamic: bool) -> None:
    learning = {"dynamic_sampling": dynamic, "max_refills": 1}
    contents = set()
    for shuffle in range(4):
        config = config_of(folder, tmp_path / str(shuffle), steps=5, learning=learning, sampling={"width": 2})
        Run(config, engine=slow_engine(shuffle)).train()
        contents.add((config.out / "trees.jsonl").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
def test_another_prompt_replaces_a_dropped_tree_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """All trees are dropped, and the first stands still until all the others have begun."""
    use_rewards(monkeypatch, EqualRewards())
    learning = {"dynamic_sampling": True, "max_refills": 1}
    config = config_of(folder, tmp_path / "run", steps=1, learning=learning, **ALONE, **changes)
    engine = slow_engine()

    def stalls(request: GenerateRequest) -> bool:
        prompts = prompts_of(engine.requests)
        return prompts_of([request])[0] == prompts[0] and len(set(prompts)) < 8

    engine.stalls = stalls
    Run(config, engine=engine).train()
    assert steps_of(config.out)[0]["dropped/equal"] == 8
    assert len(trees_of(config.out)) == 8


class EqualRewards(LengthRewards):
    def _grade(self, item: GradeItem) -> Grade:
        del item
        return Grade(1.0, Verdict.CORRECT)


@pytest.mark.parametrize("changes", [{}, OVERSAMPLE, ASYNC])
def test_an_evaluation_is_of_one_version(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The engine's tokens do not depend on its version, so each evaluation has the same answers; their
    versions are compared in `Heldout`.
    """
    config = config_of(folder, tmp_path / "run", steps=6, evaluation={"every": 2}, **changes)
    run = Run(config, engine=slow_engine(), trainer=slow_trainer(5))
    summary = run.train()
    found = [line for line in lines(config.out / "metrics.jsonl") if "heldout/accuracy" in line]
    accuracies = {line["step"]: line["heldout/accuracy"] for line in found}
    assert accuracies == run.seen.accuracies == dict.fromkeys((0, 2, 4, 6), summary["accuracy_before"])
    assert summary["accuracy_after"] == summary["accuracy_before"]
    for step in (2, 4):
        done = run.events.index(f"evaluated {step}")
        assert run.events.index(f"sync {step}") < done < run.events.index(f"sync {step + 1}")
        trained = run.events.index("train 2", run.events.index(f"sync {step}"))
        assert (trained < done) == (config.loop.mode == "async"), "it takes place beside the next step"
    check_every_prompt_was_taken_once(config)
