"""The training loop with fakes: the order of its calls, its files, and a run that resumes."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_trainer import FakeTrainer
from tests.support.training_runs import LengthRewards, Run, Seen, config_of, lines, steps_of, use_rewards
from treepo.config.run import RunConfig
from treepo.errors import ConfigError, LogProbCheckError, RewardError
from treepo.tree import Verdict, from_json

pytestmark = pytest.mark.usefixtures("graded")


def run(config: RunConfig, *, resume: bool = False) -> tuple[dict[str, Any], list[str], Seen]:
    """Train; return the summary, the calls of pool and trainer, and the reports."""
    one = Run(config, resume)
    return one.train(), one.events, one.seen


def test_every_step_samples_learns_and_serves_the_next_version(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", steps=3)
    summary, events, seen = run(config)
    steps = [["hold", "train 2", f"sync {step}", "release"] for step in (1, 2, 3)]
    check = ["hold", "release"]
    evaluated = ["evaluated 0", *steps[0], *steps[1], *steps[2], "evaluated 3"]
    assert events == [*check, *evaluated, "export checkpoint", "end"]
    assert seen.steps == [1, 2, 3]

    trees = [from_json(line) for line in (config.out / "trees.jsonl").read_bytes().splitlines()]
    versions = [{*chain.from_iterable(segment.versions for segment in tree.segments)} for tree in trees]
    assert versions == [{step} for step in (0, 1, 2) for _ in range(4)]
    metrics = steps_of(config.out)
    assert [line["logprob_difference_mean"] for line in metrics] == [0.5] * 3
    assert [line["logprob_difference_max"] for line in metrics] == [1.5] * 3
    assert all(line["seconds/train"] == 5.0 for line in metrics)
    assert all(line["train/optimizer_steps"] == 2 for line in metrics)

    assert summary == json.loads((config.out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["max_logprob_difference"] == 1.5
    assert summary["decoded_tokens"] == sum(line["rollout/decoded_tokens"] for line in metrics)
    assert summary["sequential_tokens"] == sum(tree.total_tokens() for tree in trees)
    assert summary["log_prob_check"]["max"] == 0.0
    assert summary["phase_seconds"]["train"] == 15.0
    assert sorted(entry.name for entry in (config.out / "checkpoints").iterdir()) == [
        "step-00002",
        "step-00003",
    ]


def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder: Path, tmp_path: Path) -> None:
    straight, _, _ = run(config_of(folder, tmp_path / "straight", steps=5))
    run(config_of(folder, tmp_path / "run", steps=2))
    config = config_of(folder, tmp_path / "run", steps=5)
    summary, events, seen = run(config, resume=True)
    assert events[:5] == ["hold", "load step-00002", "sync 2", "release", "hold"]
    assert seen.steps == [3, 4, 5]
    assert "evaluate before" not in seen.phases
    assert (config.out / "trees.jsonl").read_bytes() == (tmp_path / "straight" / "trees.jsonl").read_bytes()
    assert [line["step"] for line in lines(config.out / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 5]
    timed = ("seconds", "phase_seconds")
    assert {key: value for key, value in summary.items() if key not in timed} == {
        key: value for key, value in straight.items() if key not in timed
    }
    assert summary["phase_seconds"]["train"] == straight["phase_seconds"]["train"] == 25.0


def test_the_kl_divergence_may_count_in_the_rewards(folder: Path, tmp_path: Path) -> None:
    """Half a nat a token; the files keep the grader's rewards."""
    learning = {"kl_coefficient": 0.1, "kl_in": "reward", "kl_estimator": "k1"}
    config = config_of(folder, tmp_path / "run", steps=2, learning=learning)
    run(config)
    assert [line["train/reference_kl"] for line in steps_of(config.out)] == pytest.approx([0.5, 0.5])
    plain = config_of(folder, tmp_path / "plain", steps=2)
    run(plain)
    assert all("train/reference_kl" not in line for line in steps_of(plain.out))
    first = [(config.out if one else plain.out) / "trees.jsonl" for one in (True, False)]
    assert len({path.read_bytes() for path in first}) == 1


def test_dynamic_sampling_takes_each_prompt_once_a_step(folder: Path, tmp_path: Path) -> None:
    learning = {"dynamic_sampling": True, "max_refills": 3}
    config = config_of(folder, tmp_path / "run", steps=3, learning=learning)
    # With two leaves a tree, about half of the trees are dropped.
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"width": 2})})
    run(config)
    sampled = [(line["step"], line["prompt_id"]) for line in lines(config.out / "trees.jsonl")]
    assert len(set(sampled)) == len(sampled)
    dropped = {line["step"]: line["dropped/equal"] for line in steps_of(config.out)}
    assert sum(dropped.values()) > 0, "else nothing is replaced"
    for step, number in dropped.items():
        kept = sum(of_step == step for of_step, _ in sampled) - number
        assert kept == 4 or (kept < 4 and number >= 3)


def test_a_step_without_any_grade_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_rewards(monkeypatch, LengthRewards(Verdict.TIMEOUT))
    data = config_of(folder, tmp_path, steps=1).data.model_copy(update={"heldout": None})
    config = config_of(folder, tmp_path / "run", steps=1, reward={"max_failed_share": 1.0})
    config = config.model_copy(update={"data": data})
    with pytest.raises(RewardError, match="no response of this step could be graded"):
        run(config)


def test_a_disagreement_stops_the_run_before_its_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def off_by_one(_: FakeTrainer, packs: Any, temperature: float) -> Any:
        del temperature
        return [[pack.rollout_log_prob + 1.0 for pack in replica] for replica in packs]

    monkeypatch.setattr(FakeTrainer, "log_probs", off_by_one)
    config = config_of(folder, tmp_path / "run", steps=1)
    with pytest.raises(LogProbCheckError, match="trainer and engine 0 disagree"):
        run(config)
    assert not (config.out / "metrics.jsonl").read_text()
    run(config_of(folder, tmp_path / "off", steps=1, log_prob_check={"enabled": False}))


def test_a_data_set_smaller_than_a_step_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path / "run", steps=1, data={"prompts_per_step": 10})
    text = r"data\.prompts_per_step = 10, but .*problems\.jsonl has 9 usable rows"
    with pytest.raises(ConfigError, match=text):
        run(config)
    assert not config.out.exists()
