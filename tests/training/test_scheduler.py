"""The scheduler against rules that are checked one event at a time, and against brute force."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.support.simulated_schedule import ScheduleRun, Simulation, drawn_mixture, drawn_run, with_budget
from treepo.data.prompt_order import PromptOrder
from treepo.training.scheduler import Scheduler
from treepo.training.step_budget import StepBudget


@pytest.mark.parametrize("seed", range(200))
def test_no_order_of_events_breaks_a_rule(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(drawn_run(rng), rng)
    simulation.play()
    simulation.check_positions()


@pytest.mark.parametrize("seed", range(200))
def test_no_order_of_events_breaks_a_rule_for_a_mixture(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(drawn_mixture(rng), rng)
    simulation.play()
    simulation.check_positions()


@pytest.mark.parametrize("drawn", [drawn_run, drawn_mixture])
@pytest.mark.parametrize("seed", range(100))
def test_no_order_of_events_breaks_a_rule_while_the_number_of_trees_changes(
    seed: int, drawn: Callable[[random.Random], ScheduleRun]
) -> None:
    rng = random.Random(seed)
    simulation = Simulation(with_budget(drawn(rng), rng), rng)
    simulation.play()
    simulation.check_positions()


def test_steps_of_a_budget_take_the_next_prompts() -> None:
    """400 tokens a step, by hand. The first step's trees are twice as long as the other steps'."""
    budget = StepBudget(tokens=400, first=4, least=1, most=1000)
    scheduler = ScheduleRun(1000, 4, 0, 4, max_refills=2, budget=budget).scheduler()
    steps = [
        (4, 200),  # 400 too many, of which 200 are carried; 200 a tree
        (1, 100),  # 100 left; (200 / 2 x 4 + 100) / (4 / 2 + 1) = 500 / 3 a tree
        (3, 100),  # 200 left; 550 / 4.5 a tree
        (5, 100),
    ]
    first = 0
    for trees, tokens in steps:
        assert scheduler.batch == trees
        started = list(start_all(scheduler))
        assert started == list(range(first, first + trees))
        for position in started:
            assert scheduler.take() is None
            scheduler.finish(position)
        assert scheduler.take() == dict.fromkeys(started, scheduler.version)
        scheduler.trained(trees * tokens)
        first += trees


def test_refills_follow_the_number_of_trees() -> None:
    """All trees are dropped."""
    budget = StepBudget(tokens=400, first=4, least=1, most=1000)
    scheduler = ScheduleRun(1000, 4, 0, 4, max_refills=2, budget=budget).scheduler()
    for trees in (4, 1):
        assert scheduler.batch == trees
        sampled = 0
        while scheduler.take() is None:
            scheduler.drop(next(start_all(scheduler)))
            sampled += 1
        assert sampled == trees + 2 * trees
        scheduler.trained(800)


@pytest.mark.parametrize("seed", range(60))
def test_steps_of_a_mixture_hold_the_files_turns_exactly(seed: int) -> None:
    """Also where a file has no more prompts than one step takes of it."""
    rng = random.Random(seed)
    run = replace(drawn_mixture(rng), max_staleness=0, drops=0.0, fails=0.0, restores=0.0, steps=30)
    run = replace(run, max_untrained=run.batch)
    simulation = Simulation(run, rng)
    simulation.play()
    order = run.order()
    for step, taken in enumerate(simulation.batches):
        turns = range(step * run.batch, (step + 1) * run.batch)
        files, expected = (Counter(order.turn(each)[0] for each in some) for some in (taken, turns))
        assert files == expected


def test_a_file_whose_prompts_are_all_in_use_is_passed_over_and_catches_up() -> None:
    """Two files in turn. The trees of the one with 2 prompts grow slowly, and 4 is the lead of the other."""
    run = ScheduleRun(102, 4, max_staleness=1, max_untrained=8, steps=9, mixture=((2, 1), (100, 1)))
    order, scheduler = run.order(), run.scheduler()
    started = list(start_all(scheduler))
    assert Counter(order.turn(each)[0] for each in started) == {0: 2, 1: 6}
    slow = [each for each in started if order.turn(each)[0] == 0]
    for position in set(started) - set(slow):
        scheduler.finish(position)
    assert scheduler.take() is not None
    scheduler.trained()
    for position in slow:
        scheduler.finish(position)
    assert scheduler.take() is not None
    scheduler.trained()
    assert [order.turn(each)[0] for each in start_all(scheduler)][:2] == [0, 0]


@pytest.mark.parametrize("seed", range(40))
def test_every_epoch_has_every_prompt_once(seed: int) -> None:
    """Many steps of few prompts, half of whose trees are slow."""
    rng = random.Random(seed)
    run = replace(drawn_run(rng), prompts=rng.randint(5, 9), steps=60, slow=0.5)
    simulation = Simulation(run, rng)
    simulation.play()
    simulation.check_positions()
    state = simulation.scheduler.state()
    first_waiting = min([*state.again, *state.ready, state.cursor])
    ended = [*(position for batch in simulation.batches for position in batch), *simulation.lost]
    for epoch in range(first_waiting // run.prompts):
        of_epoch = [position for position in ended if position // run.prompts == epoch]
        prompts = Counter(map(PromptOrder(run.prompts, 0).index, of_epoch))
        assert prompts == Counter(range(run.prompts))


def test_epochs_do_not_drift_apart() -> None:
    """One prompt's tree finishes only if the trainer would wait for ever; the others finish at once."""
    run = ScheduleRun(prompts=5, batch=4, max_staleness=1, max_untrained=8, steps=200)
    order, scheduler = PromptOrder(5, 0), run.scheduler()
    growing: list[int] = []
    trained: Counter[int] = Counter()
    for _ in range(run.steps):
        while (taken := scheduler.take()) is None:
            growing += start_all(scheduler)
            fast = (position for position in growing if order.index(position) != 0)
            position = next(fast, growing[0])
            growing.remove(position)
            scheduler.finish(position)
        trained.update(map(order.index, taken))
        scheduler.trained()
        assert max(trained.values()) - min(trained[prompt] for prompt in range(5)) <= 3


@pytest.mark.parametrize("max_staleness", range(5))
@pytest.mark.parametrize("batch", [1, 3])
def test_as_many_trees_are_untrained_as_the_bound_allows(batch: int, max_staleness: int) -> None:
    most = batch * (max_staleness + 1)
    scheduler = ScheduleRun(1000, batch, max_staleness, most, steps=100).scheduler()
    grown: list[int] = []
    for _ in range(20):
        started = list(start_all(scheduler))
        grown += started
        assert scheduler.growing + len(scheduler.ready) == most
        for position in grown[:batch]:
            scheduler.finish(position)
        taken = scheduler.take()
        assert taken is not None
        assert list(taken) == grown[:batch]
        del grown[:batch]
        assert scheduler.next() is None, "those that are trained count until their step is done"
        scheduler.trained()


def start_all(scheduler: Scheduler) -> Iterator[int]:
    while (position := scheduler.next()) is not None:
        scheduler.start(position)
        yield position


@pytest.mark.parametrize(("prompts", "batch"), [(12, 4), (9, 3), (8, 8), (1000, 7)])
@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_without_running_ahead_a_step_has_the_next_prompts(
    prompts: int, batch: int, max_staleness: int, seed: int
) -> None:
    scheduler = ScheduleRun(prompts, batch, max_staleness, batch).scheduler()
    for step in range(1, 12):
        started = list(start_all(scheduler))
        assert started == list(range((step - 1) * batch, step * batch))
        random.Random(seed).shuffle(started)
        for position in started:
            assert scheduler.take() is None
            scheduler.finish(position)
        assert scheduler.take() == dict.fromkeys(sorted(started), step - 1)
        assert scheduler.next() is None
        scheduler.trained()


def test_a_prompt_that_an_epoch_repeats_waits_for_the_next_step() -> None:
    """5 prompts, 4 a step: a step that reaches into the next epoch may find a prompt there again."""
    order, scheduler = PromptOrder(5, 0), ScheduleRun(5, 4, 0, 4, steps=20).scheduler()
    waiting: list[int] = []
    cursor = 0
    for _ in range(15):
        expected: list[int] = []
        while len(expected) < 4:
            free = (each for each in waiting if order.index(each) not in map(order.index, expected))
            if (position := next(free, None)) is None:
                position, cursor = cursor, cursor + 1
            else:
                waiting.remove(position)
            repeated = order.index(position) in map(order.index, expected)
            (waiting if repeated else expected).append(position)
        started = list(start_all(scheduler))
        assert sorted(started) == sorted(expected)
        for position in started:
            scheduler.finish(position)
        assert scheduler.take() is not None
        scheduler.trained()


@pytest.mark.parametrize("shuffle", range(5))
def test_the_order_of_the_answers_does_not_change_which_trees_replace_dropped_ones(shuffle: int) -> None:
    """Whether a tree is dropped depends on its position alone."""
    run = ScheduleRun(prompts=30, batch=4, max_staleness=0, max_untrained=4, max_refills=1)
    batches = [
        list(batches_of(run, random.Random(seed), drops=lambda each: each % 7 < 4)) for seed in (0, shuffle)
    ]
    assert batches[0] == batches[1]
    assert {len(batch) for batch in batches[0]} > {4}, "else the replacements never run out"


def batches_of(
    run: ScheduleRun, rng: random.Random, drops: Callable[[int], bool]
) -> Iterator[tuple[int, ...]]:
    scheduler = run.scheduler()
    growing: list[int] = []
    for _ in range(run.steps):
        while (taken := scheduler.take()) is None:
            growing += start_all(scheduler)
            position = growing.pop(rng.randrange(len(growing)))
            (scheduler.drop if drops(position) else scheduler.finish)(position)
        yield tuple(taken)
        scheduler.trained()


@pytest.mark.parametrize("max_refills", [0, 1, 2])
def test_replacements_of_a_step_are_bounded(max_refills: int) -> None:
    scheduler = ScheduleRun(100, 4, 0, 4, max_refills=max_refills).scheduler()
    for step in range(6):
        growing: list[int] = []
        sampled = 0
        while (taken := scheduler.take()) is None:
            growing += start_all(scheduler)
            position, sampled = growing.pop(), sampled + 1
            if position % 3 <= step % 3:
                scheduler.drop(position)
            else:
                scheduler.finish(position)
        assert len(taken) == 4 or sampled == 4 + 4 * max_refills
        assert sampled <= 4 + 4 * max_refills
        scheduler.trained()


def test_all_failed_trees_are_replaced() -> None:
    scheduler = ScheduleRun(100, 4, 0, 4, max_refills=0).scheduler()
    for number in range(5):
        started = list(start_all(scheduler))
        assert started == list(range(4 * number, 4 * number + 4))
        for position in started:
            scheduler.fail(position)
        assert scheduler.take() is None


def test_a_small_data_set_gives_smaller_steps_if_its_trees_fail() -> None:
    scheduler = ScheduleRun(4, 4, 1, 8).scheduler()
    started = list(start_all(scheduler))
    assert len(started) == 4, "a prompt begins one tree under each version"
    scheduler.fail(started[0])
    for position in started[1:]:
        assert scheduler.take() is None
        scheduler.finish(position)
    assert scheduler.take() == dict.fromkeys(started[1:], 0)
