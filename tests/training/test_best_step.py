"""The best checkpoint stays, wherever a run dies and whichever checkpoint is damaged."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_damage import flip_bit
from tests.support.fake_trainer import FakeTrainer, NamedEngine
from tests.support.training_runs import (
    ASYNC,
    NOTHING_UNAWAITED,
    Run,
    config_of,
    lines,
    use_rewards,
)
from treepo.config.run import RunConfig
from treepo.rewards.grade import Grade, GradeItem
from treepo.training.best_step import BestStep
from treepo.training.checkpoints import newest
from treepo.tree import Verdict, from_json

pytestmark = [pytest.mark.usefixtures("graded"), NOTHING_UNAWAITED]
STEPS = 8


class KilledError(BaseException):
    """As SIGKILL, it runs no handler of errors."""


@dataclass
class ChosenRewards:
    """The accuracy of each evaluation is chosen. correct: of the 9 answers, by the version of the weights.

    An evaluation asks for single answers, training for four at once.
    """

    correct: dict[int, int]
    engine: NamedEngine = field(default_factory=lambda: NamedEngine(end=0.1))
    _seen: dict[int, int] = field(default_factory=dict)

    async def grade(self, items: list[GradeItem]) -> list[Grade]:
        if len(items) > 1:
            right = [len(item.response) % 2 == 0 for item in items]
        else:
            version = self.engine.version
            self._seen[version] = self._seen.get(version, 0) + 1
            right = [(self._seen[version] - 1) % 9 < self.correct[version]]
        return [Grade(float(one), Verdict.CORRECT if one else Verdict.WRONG) for one in right]


def run_of(config: RunConfig, rewards: ChosenRewards, *, resume: bool = False) -> Run:
    trainer = FakeTrainer()
    trainer.learns, trainer.turns = True, 5 if config.loop.mode == "async" else 0
    pace = 3 if config.loop.mode == "async" else 0
    rewards.engine = NamedEngine(end=0.1, pace=pace)
    rewards._seen.clear()
    return Run(config, resume, engine=rewards.engine, trainer=trainer)


def killed_at(run: Run, moment: int) -> None:
    """Kill the run at this moment of its trainer's calls: before one, or once it is done."""
    count = 0

    def happens(_: str) -> None:
        nonlocal count
        count += 1
        if count >= moment:
            raise KilledError

    run.trainer.before = run.trainer.after = happens


def saved(out: Path) -> set[int]:
    """The steps of the complete checkpoints."""
    return {int(path.name[5:]) for path in (out / "checkpoints").glob("step-*[0-9]")}


def accuracies(out: Path) -> dict[int, float]:
    return {
        line["step"]: line["heldout/accuracy"]
        for line in lines(out / "metrics.jsonl")
        if line.get("heldout/accuracy") is not None
    }


def best_of(known: dict[int, float], steps: set[int]) -> int | None:
    """By a loop: the first of the steps that none exceeds."""
    best = None
    for step in sorted(steps & known.keys()):
        if best is None or known[step] > known[best]:
            best = step
    return best


def marked(out: Path) -> int | None:
    path = out / "checkpoints" / "best.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


@pytest.mark.parametrize("seed", range(24))
def test_the_best_checkpoint_survives_kills_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Random accuracies, intervals and numbers of kept checkpoints. The run dies a few times, at a call of
    the trainer or anywhere; at the end the newest checkpoints and the best are there, and no other.
    """
    chosen = random.Random(seed)
    rewards = ChosenRewards({step: chosen.randrange(1, 10) for step in range(STEPS + 1)})
    use_rewards(monkeypatch, rewards)
    keep, every = chosen.choice((1, 2, 3)), chosen.choice((1, 2, 3, 5))
    config = config_of(
        folder,
        tmp_path / "run",
        STEPS,
        evaluation={"every": chosen.choice((1, 2, 3)), "best": "accuracy"},
        checkpoint={"every": every, "keep": keep},
        log_prob_check={"enabled": False},
        **(ASYNC if seed % 2 else {}),
    )
    for _ in range(chosen.randrange(4)):
        run = run_of(config, rewards, resume=config.out.exists())
        if chosen.random() < 0.5:
            killed_at(run, chosen.randrange(1, 60))
        else:
            run.killed_after = chosen.randrange(1, 3000)
        try:
            run.train()
            break  # it was done before that moment
        except* (KilledError, asyncio.CancelledError):
            assert marked(config.out) in {None, *saved(config.out)}
    if not (config.out / "summary.json").exists():
        run_of(config, rewards, resume=config.out.exists()).train()
    known, there = accuracies(config.out), saved(config.out)
    assert known == {step: rewards.correct[step] / 9 for step in known}
    best = best_of(known, {*known} - {0})
    assert best is not None
    assert marked(config.out) == best
    written = {step for step in range(1, STEPS + 1) if step % every == 0 or step in known or step == STEPS}
    assert there == {*sorted(written)[-keep:], best}
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["best"] == {"step": best, "accuracy": known[best]}
    assert lines(config.out / "metrics.jsonl")[-1]["heldout/best_step"] == best


def finished(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, correct: list[int], **changes: Any
) -> tuple[RunConfig, Run, ChosenRewards]:
    """A run of 4 steps that is evaluated after each. correct: of the 9 answers, after step 0, 1 and so on."""
    rewards = ChosenRewards(dict(enumerate(correct)))
    use_rewards(monkeypatch, rewards)
    evaluation = {"every": 1, "best": "accuracy"}
    changes = {"checkpoint": {"keep": 1}, "evaluation": evaluation} | changes
    config = config_of(folder, out, 4, log_prob_check={"enabled": False}, **changes)
    run = run_of(config, rewards)
    run.train()
    return config, run, rewards


@pytest.mark.parametrize("changes", [{}, ASYNC])
def test_the_best_model_is_exported_beside_the_last(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config, run, _ = finished(folder, tmp_path / "run", monkeypatch, [3, 2, 8, 5, 4], **changes)
    assert saved(config.out) == {2, 4}
    assert [event for event in run.events if event.startswith(("load", "export"))] == [
        "export checkpoint",
        "load step-00002",
        "export best",
    ]
    last, run, _ = finished(folder, tmp_path / "last", monkeypatch, [3, 2, 6, 5, 8], **changes)
    assert saved(last.out) == {4}
    assert [event for event in run.events if event.startswith(("load", "export"))] == [
        "export checkpoint",
        "export best",
    ]


def test_a_damaged_best_checkpoint_is_passed_over_at_the_export(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next best is exported; the log names the damage."""
    rewards = ChosenRewards({0: 3, 1: 6, 2: 8, 3: 5, 4: 4})
    use_rewards(monkeypatch, rewards)
    config = config_of(
        folder,
        tmp_path / "run",
        4,
        log_prob_check={"enabled": False},
        evaluation={"every": 1, "best": "accuracy"},
        checkpoint={"keep": None},
    )
    run = run_of(config, rewards)

    def damage(name: str) -> None:
        if name == "export" and "export checkpoint" not in run.events:
            flip_bit(config.out / "checkpoints/step-00002/weights", position=0)

    run.trainer.before = damage
    summary = run.train()
    assert summary["best"] == {"step": 1, "accuracy": 6 / 9}
    assert "load step-00001" in run.events
    assert "step-00002, the best checkpoint, is passed over" in (config.out / "log.txt").read_text()


@pytest.mark.parametrize("lost", [(4,), (3, 4)])
def test_a_resume_from_before_the_best_step_finds_the_best_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[int, ...]
) -> None:
    """The best step's checkpoint and later ones are damaged; the steps are repeated with other accuracies."""
    config, _, rewards = finished(
        folder, tmp_path / "run", monkeypatch, [3, 6, 2, 8, 4], checkpoint={"every": 1, "keep": None}
    )
    assert marked(config.out) == 3
    for step in lost:
        (config.out / f"checkpoints/step-{step:05d}/weights").write_text("damaged")
    (config.out / "summary.json").unlink()
    rewards.correct |= {3: 1, 4: 5}
    run = run_of(config, rewards, resume=True)
    summary = run.train()
    assert run.events[1] == f"load step-{min(lost) - 1:05d}"
    # Step 3 is evaluated again either way: a checkpoint is older than its evaluation.
    assert accuracies(config.out) == {0: 3 / 9, 1: 6 / 9, 2: 2 / 9, 3: 1 / 9, 4: 5 / 9}
    assert summary["best"] == {"step": 1, "accuracy": 6 / 9}
    assert marked(config.out) == 1
    assert (config.out / f"checkpoints/step-{lost[-1]:05d}.damaged").is_dir()
    assert not (config.out / "previous-1/best").exists(), "the fake exports nothing"


def test_the_marker_is_written_again_if_it_is_lost_or_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, rewards = finished(folder, tmp_path / "run", monkeypatch, [3, 6, 8, 5, 4])
    for content in (b"", b"\xff\xfe", b'{"step": 99}'):
        (config.out / "checkpoints/best.json").write_bytes(content)
        (config.out / "summary.json").unlink()
        run_of(config, rewards, resume=True).train()
        assert marked(config.out) == 2


def test_the_evaluations_trees_are_cut_back_with_the_metrics(folder: Path, tmp_path: Path) -> None:
    """A run that is killed anywhere and resumed has the trees of one that was not."""
    sets = {"short": {"path": str(folder / "problems.jsonl"), "max_problems": 3, "max_response_tokens": 4}}
    evaluation = {"every": 2, "samples": 2, "sets": sets}
    changes: dict[str, Any] = {"evaluation": evaluation, "checkpoint": {"every": 3}}
    straight = config_of(folder, tmp_path / "straight", 6, **changes)
    Run(straight).train()
    expected = (straight.out / "heldout_trees.jsonl").read_bytes()
    records = [(line["step"], line["set"]) for line in lines(straight.out / "heldout_trees.jsonl")]
    assert records == [
        pair for step in (0, 2, 4, 6) for pair in [(step, "heldout")] * 9 + [(step, "short")] * 3
    ]
    trees = [from_json(line) for line in expected.splitlines()]
    for (step, name), tree in zip(records, trees, strict=True):
        assert all((segment.versions == step).all() for segment in tree.segments)
        assert len(tree.leaves) == 2
        assert all(len(tree.response(leaf)) <= 4 for leaf in tree.leaves) or name == "heldout"
    for moment in range(2, 40, 5):
        config = config_of(folder, tmp_path / str(moment), 6, **changes)
        run = Run(config)
        killed_at(run, moment)
        try:
            run.train()
        except KilledError:
            Run(config, resume=True).train()
        assert (config.out / "heldout_trees.jsonl").read_bytes() == expected, moment
    earlier = newest(straight.out)
    assert earlier is not None
    assert earlier[1].sizes.keys() == {"metrics.jsonl", "trees.jsonl", "heldout_trees.jsonl"}


def test_ties_go_to_the_first_step_and_nan_counts_for_nothing(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", 4, evaluation={"every": 1, "best": "accuracy"})
    records = [
        {"step": step, "heldout/accuracy": value}
        for step, value in ((0, 0.9), (1, None), (2, 0.5), (3, float("nan")), (4, 0.5))
    ]
    best = BestStep(config, records)
    assert best.of([1, 2, 3, 4]) == 2
    assert best.of([4]) == 4
    assert best.of([1, 3]) is None
