"""The scheduler against rules that are checked one event at a time, and against brute force."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

import pytest

from treepo.data.prompts import PromptOrder
from treepo.training.scheduler import Scheduler, ScheduleState


@dataclass(frozen=True)
class Run:
    """The settings of one simulated run, and the chances of its events."""

    prompts: int
    batch: int
    max_staleness: int
    max_untrained: int
    max_replaced: int = 1000
    steps: int = 12
    drops: float = 0.0
    fails: float = 0.0
    restores: float = 0.0
    slow: float = 0.0  # share of trees that finish only if no other tree is left

    def scheduler(self, version: int = 0, state: ScheduleState | None = None) -> Scheduler:
        return Scheduler(
            PromptOrder(self.prompts, 0),
            batch=self.batch,
            max_staleness=self.max_staleness,
            max_untrained=self.max_untrained,
            max_replaced=self.max_replaced,
            steps=self.steps,
            version=version,
            state=state,
        )


def drawn_run(rng: random.Random) -> Run:
    batch, max_staleness = rng.randint(1, 5), rng.randint(0, 4)
    return Run(
        prompts=batch + rng.choice([0, 1, rng.randrange(40)]),
        batch=batch,
        max_staleness=max_staleness,
        max_untrained=rng.randint(batch, batch * (max_staleness + 1)),
        max_replaced=rng.choice([0, batch, 1000]),
        steps=rng.randint(1, 12),
        drops=rng.choice([0.0, 0.2, 0.6]),
        fails=rng.choice([0.0, 0.2]),
        restores=rng.choice([0.0, 0.3]),
        slow=rng.choice([0.0, 0.3, 0.9]),
    )


@dataclass
class Simulation:
    """Plays a run with events in random order, and checks every rule that must hold after each."""

    run: Run
    rng: random.Random
    version: int = 0
    batches: list[Mapping[int, int]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # dropped or failed
    growing: dict[int, int] = field(default_factory=dict)  # position, version that it began with
    ready: dict[int, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)  # prompts, under this version
    slow: set[int] = field(default_factory=set)
    dropped: int = 0  # since the last step took its trees
    inherited: int = 0  # ready trees of the last restore

    def __post_init__(self) -> None:
        self.order = PromptOrder(self.run.prompts, 0)
        self.scheduler = self.run.scheduler()

    def play(self) -> None:
        while self.version < self.run.steps:
            taken = self.wait_for_batch()
            self.batches.append(taken)
            for _ in range(self.rng.randrange(12)):  # while the trainer learns
                self.any_event(training=len(taken))
            self.scheduler.trained()
            self.version += 1
            self.begun.clear()
            if self.rng.random() < self.run.restores:
                self.restore()

    def wait_for_batch(self) -> Mapping[int, int]:
        for _ in range(10_000):
            if self.rng.random() < 0.7 and self.any_event():
                continue
            if (taken := self.try_to_take()) is not None:
                return taken
            assert self.any_event(), "the trainer waits and nothing can happen"
        raise AssertionError("the trainer waits for ever")

    def any_event(self, training: int = 0) -> bool:
        """Start or end a tree; False if neither is possible."""
        starts = self.scheduler.next() is not None
        if starts and (not self.growing or self.rng.random() < 0.5):
            self.start(training)
        elif self.growing:
            self.end(self.rng.choice(self.finishing()))
        else:
            return False
        return True

    def finishing(self) -> list[int]:
        """The slow ones last."""
        fast = [position for position in self.growing if position not in self.slow]
        return fast or list(self.growing)

    def start(self, training: int) -> None:
        position = self.scheduler.next()
        assert position is not None
        prompt = self.order.index(position)
        assert prompt not in self.begun
        assert prompt not in map(self.order.index, (*self.growing, *self.ready))
        self.scheduler.start(position)
        self.growing[position] = self.version
        self.begun.add(prompt)
        if self.rng.random() < self.run.slow:
            self.slow.add(position)
        untrained = training + len(self.growing) + len(self.ready)
        assert untrained <= max(self.run.max_untrained, self.inherited)
        left = self.run.steps - self.version - bool(training)
        assert len(self.growing) + len(self.ready) <= left * self.run.batch, "no step is left for it"

    def end(self, position: int) -> None:
        chance, began = self.rng.random(), self.growing.pop(position)
        if chance < self.run.drops:
            self.scheduler.drop(position)
            self.lost.append(position)
            self.dropped += 1
        elif chance < self.run.drops + self.run.fails:
            self.scheduler.fail(position)
            self.lost.append(position)
        else:
            self.scheduler.finish(position)
            self.ready[position] = began

    def try_to_take(self) -> Mapping[int, int] | None:
        wanted = self.run.batch - min(max(self.dropped - self.run.max_replaced, 0), self.run.batch)
        more = bool(self.growing) or self.scheduler.next() is not None
        taken = self.scheduler.take()
        if taken is None:
            assert not can_take(self.run, self.version, self.growing, self.ready, wanted if more else 0)
            return None
        assert list(taken) == sorted(taken)
        assert len(taken) <= self.run.batch
        assert len(taken) >= wanted or not more
        for position, began in taken.items():
            assert self.ready.pop(position) == began
            assert 0 <= self.version - began <= self.run.max_staleness
        assert not taken or max(taken.values()) <= min(self.ready.values(), default=self.version), (
            "oldest first"
        )
        self.dropped = 0
        return taken

    def restore(self) -> None:
        """Go on from a checkpoint, perhaps with another bound."""
        state = self.scheduler.state()
        state.check(self.version)
        assert state.ready == sorted(self.ready)
        assert len(state.dropped) == self.dropped
        if self.rng.random() < 0.5:
            most = self.rng.randint(0, 4)
            untrained = self.rng.randint(self.run.batch, self.run.batch * (most + 1))
            self.run = replace(self.run, max_staleness=most, max_untrained=untrained)
        self.scheduler = self.run.scheduler(self.version, state)
        kept = {position: self.ready[position] for position in self.scheduler.ready}
        assert self.scheduler.resampled == len(self.ready) - len(kept)
        for position in self.ready.keys() - kept.keys():
            spare = self.ready[position] + self.run.max_staleness - self.version
            older = sum(began <= self.ready[position] for began in kept.values())
            assert spare < 0 or older >= (spare + 1) * self.run.batch, "its step has room"
        self.growing, self.ready, self.inherited = {}, kept, len(kept)
        assert self.scheduler.growing == 0

    def check_positions(self) -> None:
        """Every position below the cursor was taken or lost once, or still waits."""
        state = self.scheduler.state()
        waiting = [*state.again, *state.ready]
        ended = [*(position for batch in self.batches for position in batch), *self.lost]
        assert sorted([*ended, *waiting]) == list(range(state.cursor))
        assert state.cursor - min(waiting, default=state.cursor) <= 3 * self.run.prompts, "epochs drift apart"


def can_take(
    run: Run, version: int, growing: Mapping[int, int], ready: Mapping[int, int], least: int
) -> bool:
    """Try all choices of at least `least` ready trees: whether one leaves a step for every other tree, if
    those that grow finish in time.
    """
    for number in range(least, min(run.batch, len(ready)) + 1):
        for chosen in combinations(ready, number):
            others = [began for position, began in {**growing, **ready}.items() if position not in chosen]
            if fit(run, version, others):
                return True
    return False


def fit(run: Run, version: int, began: list[int]) -> bool:
    """Whether the steps after the next one can train trees of these versions: the most urgent first."""
    left = sorted(each + run.max_staleness for each in began)
    step = version + 1
    while left:
        if left[0] < step:
            return False
        left, step = left[run.batch :], step + 1
    return True


@pytest.mark.parametrize("seed", range(400))
def test_no_order_of_events_breaks_a_rule(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(drawn_run(rng), rng)
    simulation.play()
    simulation.check_positions()


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
    run = Run(prompts=5, batch=4, max_staleness=1, max_untrained=8, steps=200)
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
    scheduler = Run(1000, batch, max_staleness, most, steps=100).scheduler()
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
    scheduler = Run(prompts, batch, max_staleness, batch).scheduler()
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
    order, scheduler = PromptOrder(5, 0), Run(5, 4, 0, 4, steps=20).scheduler()
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
    run = Run(prompts=30, batch=4, max_staleness=0, max_untrained=4, max_replaced=5)
    batches = [
        list(batches_of(run, random.Random(seed), drops=lambda each: each % 7 < 4)) for seed in (0, shuffle)
    ]
    assert batches[0] == batches[1]
    assert {len(batch) for batch in batches[0]} > {4}, "else the replacements never run out"


def batches_of(run: Run, rng: random.Random, drops: Callable[[int], bool]) -> Iterator[tuple[int, ...]]:
    scheduler = run.scheduler()
    growing: list[int] = []
    for _ in range(run.steps):
        while (taken := scheduler.take()) is None:
            growing += start_all(scheduler)
            position = growing.pop(rng.randrange(len(growing)))
            (scheduler.drop if drops(position) else scheduler.finish)(position)
        yield tuple(taken)
        scheduler.trained()


@pytest.mark.parametrize("max_replaced", [0, 1, 5])
def test_replacements_of_a_step_are_bounded(max_replaced: int) -> None:
    scheduler = Run(100, 4, 0, 4, max_replaced=max_replaced).scheduler()
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
        assert len(taken) == 4 or sampled == 4 + max_replaced
        assert sampled <= 4 + max_replaced
        scheduler.trained()


def test_all_failed_trees_are_replaced() -> None:
    scheduler = Run(100, 4, 0, 4, max_replaced=0).scheduler()
    for number in range(5):
        started = list(start_all(scheduler))
        assert started == list(range(4 * number, 4 * number + 4))
        for position in started:
            scheduler.fail(position)
        assert scheduler.take() is None


def test_a_small_data_set_gives_smaller_steps_if_its_trees_fail() -> None:
    scheduler = Run(4, 4, 1, 8).scheduler()
    started = list(start_all(scheduler))
    assert len(started) == 4, "a prompt begins one tree under each version"
    scheduler.fail(started[0])
    for position in started[1:]:
        assert scheduler.take() is None
        scheduler.finish(position)
    assert scheduler.take() == dict.fromkeys(started[1:], 0)
