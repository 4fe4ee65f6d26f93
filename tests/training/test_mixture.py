"""Training on several files with weights: shares, metrics, resuming; with fakes."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import write_model_and_problems
from tests.support.training_runs import (
    ASYNC,
    OVERSAMPLE,
    Run,
    check_every_prompt_was_taken_once,
    config_of,
    inputs_of,
    slow_engine,
    slow_trainer,
    steps_of,
    trees_of,
)
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.preflight.inputs import read_train_inputs
from treepo.training.checkpoints import newest
from treepo.training.metrics import file_metrics
from treepo.training.resume import find_resume

pytestmark = pytest.mark.usefixtures("graded")
OVERSAMPLED = {"loop": {"max_staleness": 1}, **OVERSAMPLE}
WEIGHTS = {"large": 1, "small": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with files of 9 and of 3 problems."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("large", 9), ("small", 3), ("problems", 2)):
        write_model_and_problems(folder, folder / f"{name}.jsonl", count)
    return folder


def mixture(files: Path, out: Path, steps: int = 6, **changes: Any) -> RunConfig:
    """3 of the 4 prompts of a step are from the file that has just 3."""
    train = [{"path": str(files / f"{name}.jsonl"), "weight": weight} for name, weight in WEIGHTS.items()]
    data = {"train": train, "heldout": None} | changes.pop("data", {})
    return config_of(files, out, steps, data=data, **changes)


def names_of_steps(config: RunConfig) -> dict[int, Counter[str]]:
    found: dict[int, Counter[str]] = {}
    for step, tree in trees_of(config.out):
        found.setdefault(step, Counter())[tree.prompt_id.rpartition(":")[0]] += 1
    return found


def test_every_step_has_the_shares_and_the_small_file_repeats(files: Path, tmp_path: Path) -> None:
    config = mixture(files, tmp_path / "run")
    Run(config).train()
    assert names_of_steps(config) == {step: Counter(large=1, small=3) for step in range(1, 7)}
    ids = [tree.prompt_id for _, tree in trees_of(config.out)]
    for epoch in range(6):
        small = [each for each in ids[4 * epoch : 4 * epoch + 4] if each.startswith("small")]
        assert sorted(small) == ["small:0", "small:1", "small:2"]
    assert len({each for each in ids if each.startswith("large")}) == 6
    line = "large 25.0%: 6 of 9 (0.67 epochs); small 75.0%: 18 of 3 (6.00 epochs)"
    assert f"prompts in 6 steps of 4: {line}" in (config.out / "log.txt").read_text()


def test_a_budget_takes_no_more_prompts_of_a_file_than_it_has(files: Path, tmp_path: Path) -> None:
    config = mixture(files, tmp_path / "run", steps=3, data={"decoded_tokens_per_step": 10**6})
    Run(config).train()
    assert names_of_steps(config) == {step: Counter(large=1, small=3) for step in range(1, 4)}
    log = (config.out / "log.txt").read_text()
    assert "(3.00 epochs); more or fewer with data.decoded_tokens_per_step\n" in log


def test_the_metrics_of_each_file(files: Path, tmp_path: Path) -> None:
    config = mixture(files, tmp_path / "run", steps=3)
    Run(config).train()
    for line in steps_of(config.out):
        assert (line["prompts_of/large"], line["prompts_of/small"]) == (0.25, 0.75)
        trees = [tree for step, tree in trees_of(config.out) if step == line["step"]]
        for name in WEIGHTS:
            own = [tree for tree in trees if tree.prompt_id.startswith(name)]
            rewards = [leaf.reward for tree in own for leaf in tree.leaves if leaf.reward is not None]
            assert line[f"reward_of/{name}"] == pytest.approx(sum(rewards) / len(rewards))
            assert line[f"accuracy_of/{name}"] == line[f"reward_of/{name}"], "by LengthRewards"
    only_large = [tree for _, tree in trees_of(config.out) if tree.prompt_id.startswith("large")]
    assert file_metrics(only_large, ["large", "small"]).keys() == {
        "prompts_of/large",
        "prompts_of/small",
        "reward_of/large",
        "accuracy_of/large",
    }


def test_a_single_path_has_no_metrics_of_files(files: Path, tmp_path: Path) -> None:
    config = mixture(files, tmp_path / "run", steps=1, data={"train": str(files / "large.jsonl")})
    Run(config).train()
    assert not [name for name in steps_of(config.out)[0] if "_of/" in name]


@pytest.mark.parametrize("saved", [2, 4])
def test_a_resumed_run_takes_the_prompts_of_an_uninterrupted_one(
    files: Path, tmp_path: Path, saved: int
) -> None:
    whole, parts = (mixture(files, tmp_path / name) for name in ("whole", "parts"))
    Run(whole).train()
    Run(mixture(files, tmp_path / "parts", steps=saved)).train()
    Run(parts, resume=True).train()
    assert [(step, tree.prompt_id) for step, tree in trees_of(parts.out)] == [
        (step, tree.prompt_id) for step, tree in trees_of(whole.out)
    ]


@pytest.mark.parametrize(
    ("loop", "dynamic"), [({}, True), (ASYNC, False), (ASYNC, True), (OVERSAMPLED, False)]
)
def test_a_killed_run_loses_and_repeats_no_prompt(
    files: Path, tmp_path: Path, loop: dict[str, Any], dynamic: bool
) -> None:
    changes = {**loop, "learning": {"mini_batches": 2, "dynamic_sampling": dynamic}}
    config = mixture(files, tmp_path / "run", steps=8, **changes)
    with pytest.raises(asyncio.CancelledError):
        Run(config, engine=slow_engine(1), trainer=slow_trainer(50), killed_after=300).train()
    found = newest(config.out)
    assert found is not None
    assert 0 < found[1].steps_done < 8
    Run(config, resume=True, engine=slow_engine(2), trainer=slow_trainer(50)).train()
    assert [line["step"] for line in steps_of(config.out)] == list(range(1, 9))
    check_every_prompt_was_taken_once(config)
    taken = sum(names_of_steps(config).values(), Counter())
    assert abs(taken["small"] - 0.75 * taken.total()) <= 2 * config.max_untrained


def test_a_file_with_too_few_prompts_is_refused(files: Path, tmp_path: Path) -> None:
    train = [str(files / "large.jsonl"), {"path": str(files / "problems.jsonl"), "weight": 3}]
    with pytest.raises(ConfigError) as error:
        inputs_of(mixture(files, tmp_path, data={"train": train}))
    assert str(error.value) == (
        f"data.train.1: {files / 'problems.jsonl'} has 2 usable rows, but by its weight a step of "
        "data.prompts_per_step = 4 takes up to 3 of its prompts; lower the weight, or join files"
    )


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ([{"path": "large.jsonl"}, {"path": "small.jsonl", "weight": 2}], "weight = 3.0, now 2.0"),
        ([{"path": "small.jsonl", "weight": 3}, {"path": "large.jsonl"}], "data.train.0.path = "),
        ("large.jsonl", 'data.train = nothing, now "'),
    ],
)
def test_another_mixture_is_refused_on_resume(files: Path, tmp_path: Path, changed: Any, line: str) -> None:
    Run(mixture(files, tmp_path / "run", steps=2)).train()
    train: Any = str(files / changed) if isinstance(changed, str) else []
    if isinstance(changed, list):
        train = [{**one, "path": str(files / one["path"])} for one in changed]
    with pytest.raises(ConfigError, match="these keys cannot change during a run") as error:
        Run(mixture(files, tmp_path / "run", data={"train": train}), resume=True).train()
    assert line in str(error.value)


def test_changed_rows_are_refused_on_resume(tmp_path: Path) -> None:
    for name, count in (("large", 9), ("small", 3)):
        write_model_and_problems(tmp_path, tmp_path / f"{name}.jsonl", count)
    Run(mixture(tmp_path, tmp_path / "run", steps=2)).train()
    small = tmp_path / "small.jsonl"
    small.write_text("".join(reversed(small.read_text().splitlines(keepends=True))))
    config = mixture(tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"large.jsonl, .*small.jsonl have changed since"):
        find_resume(config, read_train_inputs(config))
