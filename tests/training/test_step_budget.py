"""The number of trees that a budget of decoded tokens buys: bounds, and runs whose trees change in length."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.support.command import write_model_and_problems
from tests.support.simulated_schedule import trees_of_next_step
from tests.support.training_runs import (
    Run,
    check_every_prompt_was_taken_once,
    config_of,
    saved_schedule,
    slow_engine,
    slow_trainer,
    steps_of,
    trees_of,
)
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.training.checkpoints import newest
from treepo.training.run_state import RunState
from treepo.training.scheduler import ScheduleState
from treepo.training.step_budget import Spending, StepBudget

BUDGET = StepBudget(tokens=100_000, first=64, least=4, most=5000)
SPREAD = 0.6  # of a tree's tokens, as a share of their mean
_READ = TypeAdapter(Spending)


@dataclass
class Played:
    """The steps of a simulated run."""

    trees: list[int] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    spent: Spending = field(default_factory=Spending)

    @property
    def total(self) -> int:
        return sum(self.decoded)


def play(
    mean_tokens: Callable[[int], float], steps: int, budget: StepBudget = BUDGET, seed: int = 0
) -> Played:
    """mean_tokens: of a tree, by step; each tree's own are gamma-distributed."""
    rng, run = np.random.default_rng(seed), Played()
    for step in range(steps):
        trees = budget.trees(run.spent)
        shape = 1 / SPREAD**2
        tokens = rng.gamma(shape, mean_tokens(step) / shape, trees)
        run.trees.append(trees)
        run.decoded.append(int(tokens.round().sum()))
        run.spent = budget.after(run.spent, trees, run.decoded[-1])
    return run


GROWING = {
    "steady": lambda _: 1500.0,
    "twice as long": lambda step: 1500.0 * 2 ** (step / 100),
    "a third as long": lambda step: 1500.0 * 3 ** (-step / 100),
    "1% longer every step": lambda step: 1000.0 * 1.01**step,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", GROWING)
def test_all_steps_together_decode_their_budgets_but_for_one_steps_error(name: str, seed: int) -> None:
    """The error does not grow with the run: 4 standard deviations of one step, half a tree, 3% for drift."""
    run = play(GROWING[name], steps=100, seed=seed)
    error = abs(run.total - 100 * BUDGET.tokens) / BUDGET.tokens
    trees = run.trees[-1]
    assert error <= 4 * SPREAD * (4 / 3 / trees) ** 0.5 + 0.5 / trees + 0.03
    assert run.spent.left == 100 * BUDGET.tokens - run.total, "no step missed by half a budget"


@pytest.mark.parametrize("name", GROWING)
def test_a_drift_does_not_change_what_a_step_decodes(name: str) -> None:
    """The mean over 200 runs, of each step after the first ones. 5 standard errors, and 0.3% because the
    inverse of a noisy mean is too large on average.
    """
    decoded = np.array([play(GROWING[name], 40, seed=seed).decoded for seed in range(200)])[:, 5:]
    means = decoded.mean(0) / BUDGET.tokens
    errors = decoded.std(0) / BUDGET.tokens / 200**0.5
    assert (abs(means - 1) <= 5 * errors + 0.003).all()


def test_a_step_misses_as_the_module_says() -> None:
    """A step misses by what the module says, and by what it makes good of the step before."""
    steady = GROWING["steady"]
    runs = [play(steady, 200, seed=seed) for seed in range(20)]
    missed = np.concatenate([np.array(run.decoded[5:]) / BUDGET.tokens - 1 for run in runs])
    trees = np.mean([run.trees[5:] for run in runs])
    expected = SPREAD * (4 / 3 / trees) ** 0.5
    assert missed.std() == pytest.approx(expected * 2**0.5, rel=0.2), (
        "its own error, and the last one made good"
    )


@given(
    decoded=st.lists(st.integers(0, 10**9), max_size=30),
    least=st.integers(1, 10),
    more=st.integers(0, 100),
)
def test_whatever_a_step_decodes_the_next_one_is_within_its_bounds(
    decoded: list[int], least: int, more: int
) -> None:
    budget = StepBudget(1000, least, least, least + more)
    spent = Spending()
    for tokens in decoded:
        trees = budget.trees(spent)
        assert budget.least <= trees <= budget.most
        spent = budget.after(spent, trees, tokens)
        spent.check()
        assert abs(spent.left) <= budget.tokens / 2
        assert _READ.validate_json(json.dumps(asdict(spent)), strict=True) == spent


def test_a_budget_below_the_fewest_trees_is_overdrawn_by_half_at_most() -> None:
    budget = replace(BUDGET, tokens=2000)
    run = play(GROWING["steady"], 50, budget)
    assert run.trees[5:] == [budget.least] * 45
    assert run.spent.left == -1000
    assert budget.after(run.spent, 4, 400).left == 600, "it is made good as soon as trees are short"


@pytest.mark.parametrize(
    ("spent", "fault"),
    [
        (Spending(decoded=-1.0), "cannot be negative"),
        (Spending(trees=-1.0), "cannot be negative"),
        (Spending(left=float("inf")), "must be finite"),
        (Spending(decoded=float("nan")), "must be finite"),
    ],
)
def test_a_spending_of_no_run_is_refused(spent: Spending, fault: str) -> None:
    with pytest.raises(ValueError, match=f"spent: .* {fault}"):
        spent.check()


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(min_value=0, allow_infinity=False),
    st.floats(min_value=0, allow_infinity=False),
)
def test_every_spending_that_is_accepted_gives_a_number(left: float, decoded: float, trees: float) -> None:
    spent = Spending(left, decoded, trees)
    spent.check()
    assert BUDGET.least <= BUDGET.trees(spent) <= BUDGET.most


def budgeted(folder: Path, out: Path, steps: int = 8, **changes: Any) -> RunConfig:
    """A run with 8 trees in the first step, and a budget of 300 tokens in all steps."""
    data = {"train": str(folder / "many.jsonl"), "prompts_per_step": 8, "decoded_tokens_per_step": 300}
    data |= {"heldout": None} | changes.pop("data", {})
    return config_of(folder, out, steps, data=data, **changes)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folder`, with 40 problems."""
    folder = tmp_path_factory.mktemp("many")
    write_model_and_problems(folder, folder / "many.jsonl", 40)
    return folder


@pytest.mark.usefixtures("graded")
@pytest.mark.parametrize("dynamic", [False, True])
def test_each_step_has_the_trees_that_the_steps_before_it_allow(
    many: Path, tmp_path: Path, dynamic: bool
) -> None:
    """With dynamic sampling a tree costs more, because what is dropped counts."""
    learning = {"mini_batches": 2, "dynamic_sampling": dynamic, "max_refills": 4}
    config = budgeted(many, tmp_path / "run", learning=learning)
    Run(config).train()
    steps = steps_of(config.out)
    trained = [int(line["trees/trained"]) for line in steps]
    decoded = [int(line["rollout/decoded_tokens"]) for line in steps]
    spent = list(zip(trained, decoded, strict=True))
    budget = StepBudget(300, first=8, least=2, most=40)
    assert trained[1:] == [trees_of_next_step(budget, spent[:step]) for step in range(1, 8)]
    assert len(set(trained)) > 2, "else nothing is tested"
    sampled = Counter(step for step, _ in trees_of(config.out))
    dropped = [int(line.get("dropped/equal", 0)) for line in steps]
    assert [sampled[step] for step in range(1, 9)] == [
        sum(each) for each in zip(trained, dropped, strict=True)
    ]
    assert (sum(dropped) > 0) == dynamic
    assert saved_schedule(config.out).spent.left == 300 * 8 - sum(decoded), "no step missed by half a budget"


@pytest.mark.usefixtures("graded")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_resumed_run_has_the_same_steps(many: Path, tmp_path: Path, dynamic: bool) -> None:
    learning = {"mini_batches": 2, "dynamic_sampling": dynamic}
    whole, parts = (budgeted(many, tmp_path / name, learning=learning) for name in ("whole", "parts"))
    Run(whole).train()
    with pytest.raises(asyncio.CancelledError):
        Run(parts, engine=slow_engine(1), trainer=slow_trainer(50), killed_after=400).train()
    found = newest(parts.out)
    assert found is not None
    assert 0 < found[1].steps_done < 8
    Run(parts, resume=True, engine=slow_engine(2)).train()
    assert (parts.out / "trees.jsonl").read_bytes() == (whole.out / "trees.jsonl").read_bytes()
    assert saved_schedule(parts.out) == saved_schedule(whole.out)
    check_every_prompt_was_taken_once(parts)


@pytest.mark.usefixtures("graded")
def test_a_run_cannot_get_another_budget(many: Path, tmp_path: Path) -> None:
    Run(budgeted(many, tmp_path / "run", steps=2)).train()
    other = budgeted(many, tmp_path / "run", data={"decoded_tokens_per_step": 400})
    with pytest.raises(ConfigError, match=r"decoded_tokens_per_step = 300, now 400; these keys cannot"):
        Run(other, resume=True).train()


@pytest.mark.usefixtures("graded")
def test_a_step_is_never_larger_than_the_training_set(many: Path, tmp_path: Path) -> None:
    config = budgeted(many, tmp_path / "run", steps=4, data={"decoded_tokens_per_step": 10**6})
    Run(config).train()
    assert [line["trees/trained"] for line in steps_of(config.out)] == [8, 40, 40, 40]
    taken = [tree.prompt_id for step, tree in trees_of(config.out) if step > 1]
    assert Counter(Counter(taken).values()) == {3: 40}


def test_a_checkpoint_without_a_spending_is_of_a_run_without_a_budget() -> None:
    """As versions before the key wrote it."""
    values = asdict(RunState("d", 3, ScheduleState(cursor=12)))
    del values["schedule"]["spent"]
    assert RunState.of_manifest(values).schedule == ScheduleState(cursor=12)
    values["schedule"]["spent"] = {"left": 0.0, "decoded": -1.0, "trees": 0.0}
    with pytest.raises(ValueError, match="spent: decoded and trees cannot be negative"):
        RunState.of_manifest(values)
