"""A scheduler's run with events in random order, checked after each of them."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations, count

from treepo.data.prompt_order import MixtureOrder, PromptOrder, TrainingOrder
from treepo.training.scheduler import Scheduler, ScheduleState
from treepo.training.step_budget import StepBudget


@dataclass(frozen=True)
class ScheduleRun:
    """The settings of one simulated run, and the chances of its events."""

    prompts: int
    batch: int
    max_staleness: int
    max_untrained: int
    max_refills: int = 1000
    steps: int = 12
    drops: float = 0.0
    fails: float = 0.0
    restores: float = 0.0
    slow: float = 0.0  # share of trees that finish only if no other tree is left
    mixture: tuple[tuple[int, int], ...] = ()  # prompts and weight of each file, if there are several
    budget: StepBudget | None = None  # with it, batch and max_untrained are those of the next step

    def order(self) -> TrainingOrder:
        if not self.mixture:
            return PromptOrder(self.prompts, 0)
        sizes = {f"file{number}": size for number, (size, _) in enumerate(self.mixture)}
        return MixtureOrder(sizes, [weight for _, weight in self.mixture], 0)

    def scheduler(self, version: int = 0, state: ScheduleState | None = None) -> Scheduler:
        return Scheduler(
            self.order(),
            batch=self.batch,
            max_staleness=self.max_staleness,
            max_untrained=self.max_untrained,
            max_refills=self.max_refills,
            steps=self.steps,
            version=version,
            budget=self.budget,
            state=state,
        )


def drawn_run(rng: random.Random) -> ScheduleRun:
    batch, max_staleness = rng.randint(1, 5), rng.randint(0, 4)
    return ScheduleRun(
        prompts=batch + rng.choice([0, 1, rng.randrange(40)]),
        batch=batch,
        max_staleness=max_staleness,
        max_untrained=rng.randint(batch, batch * (max_staleness + 1)),
        max_refills=rng.choice([0, 1, 1000]),
        steps=rng.randint(1, 12),
        drops=rng.choice([0.0, 0.2, 0.6]),
        fails=rng.choice([0.0, 0.2]),
        restores=rng.choice([0.0, 0.3]),
        slow=rng.choice([0.0, 0.3, 0.9]),
    )


def drawn_mixture(rng: random.Random) -> ScheduleRun:
    """A run on 2 to 4 files, some of which have just as many prompts as a step may take."""
    run = drawn_run(rng)
    weights = [rng.choice([1, 2, rng.randint(1, 20)]) for _ in range(rng.randint(2, 4))]
    some = MixtureOrder({str(file): 1 for file in range(len(weights))}, weights, 0)
    sizes = [some.most_turns(file, run.batch) + rng.choice([0, 0, 1, 20]) for file in range(len(weights))]
    sizes = [max(size, 1) for size in sizes]
    return replace(run, prompts=sum(sizes), mixture=tuple(zip(sizes, weights, strict=True)))


def with_budget(run: ScheduleRun, rng: random.Random) -> ScheduleRun:
    """The run with a budget that changes the number of trees from step to step."""
    most = run.order().largest_step
    budget = StepBudget(run.batch * 100, run.batch, rng.randint(1, run.batch), most)
    return replace(run, max_untrained=run.batch, budget=budget)


@dataclass
class Simulation:
    """Plays a run with events in random order, and checks every rule that must hold after each."""

    run: ScheduleRun
    rng: random.Random
    version: int = 0
    batches: list[Mapping[int, int]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # dropped or failed
    growing: dict[int, int] = field(default_factory=dict)  # position, version that it began with
    ready: dict[int, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)  # prompts, under this version
    slow: set[int] = field(default_factory=set)
    started: set[int] = field(default_factory=set)  # positions
    dropped: int = 0  # since the last step took its trees
    inherited: int = 0  # ready trees of the last restore
    spent: list[tuple[int, int]] = field(default_factory=list)  # trees and decoded tokens of each step

    def __post_init__(self) -> None:
        self.order = self.run.order()
        self.scheduler = self.run.scheduler()

    def play(self) -> None:
        while self.version < self.run.steps:
            taken = self.wait_for_batch()
            self.batches.append(taken)
            for _ in range(self.rng.randrange(12)):  # while the trainer learns
                self.any_event(training=len(taken))
            self.end_step()
            self.version += 1
            self.begun.clear()
            if self.rng.random() < self.run.restores:
                self.restore()

    def end_step(self) -> None:
        """With a budget, trees become three times as long during the run."""
        if self.run.budget is None:
            self.scheduler.trained()
            return
        length = 50 + 100 * self.version // self.run.steps
        decoded = sum(self.rng.randint(1, 2 * length) for _ in range(self.run.batch))
        self.spent.append((self.run.batch, decoded))
        self.scheduler.trained(decoded)
        batch = trees_of_next_step(self.run.budget, self.spent)
        self.run = replace(self.run, batch=batch, max_untrained=batch)
        assert self.scheduler.batch == batch

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
        assert position == self.next_in_turn()
        prompt = self.order.index(position)
        assert prompt not in self.begun
        assert prompt not in map(self.order.index, (*self.growing, *self.ready))
        self.scheduler.start(position)
        self.started.add(position)
        self.growing[position] = self.version
        self.begun.add(prompt)
        if self.rng.random() < self.run.slow:
            self.slow.add(position)
        untrained = training + len(self.growing) + len(self.ready)
        assert untrained <= max(self.run.max_untrained, self.inherited)
        left = self.run.steps - self.version - bool(training)
        assert len(self.growing) + len(self.ready) <= left * self.run.batch, "no step is left for it"

    def next_in_turn(self) -> int | None:
        """The next position to start, from nothing but the set of those that have started."""
        barred = {*self.begun, *map(self.order.index, (*self.growing, *self.ready))}
        due: list[tuple[int, int | None]] = []
        for file, size in enumerate(self.order.sizes):
            turns = {turn for each, turn in map(self.order.turn, self.started) if each == file}
            first = next(turn for turn in count() if turn not in turns)
            later = [self.order.position(file, turn) for turn in range(first, first + size)]
            free = (
                each for each in later if each not in self.started and self.order.index(each) not in barred
            )
            due.append((self.order.position(file, len(turns)), next(free, None)))
        limit = min(due)[0] + self.run.max_untrained
        return next((free for turn, free in sorted(due) if turn <= limit and free is not None), None)

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

    def unreplaced(self) -> int:
        return min(max(self.dropped - self.run.max_refills * self.run.batch, 0), self.run.batch)

    def try_to_take(self) -> Mapping[int, int] | None:
        wanted = self.run.batch - self.unreplaced()
        more = bool(self.growing) or self.scheduler.next() is not None
        room = min(self.run.max_untrained, (self.run.steps - self.version) * self.run.batch)
        if not more and len(self.ready) < room - (self.run.batch - wanted):
            assert self.next_in_turn() is None
        taken = self.scheduler.take()
        if taken is None:
            assert not can_take(
                self.run, self.version, self.growing, self.ready, max(wanted, 1) if more else 0
            )
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
        if self.rng.random() < 0.5 and self.run.budget is None:
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
        self.started -= {*self.growing, *(self.ready.keys() - kept.keys())}
        self.growing, self.ready, self.inherited = {}, kept, len(kept)
        assert self.scheduler.growing == 0
        assert self.scheduler.batch == self.run.batch

    def check_positions(self) -> None:
        """Every position below the cursor was taken or lost once, or still waits."""
        state = self.scheduler.state()
        waiting = [*state.again, *state.ready]
        ended = [*(position for batch in self.batches for position in batch), *self.lost]
        assert sorted([*ended, *waiting]) == list(range(state.cursor))
        for file, size in enumerate(self.order.sizes):
            started = [turn for each, turn in map(self.order.turn, self.started) if each == file]
            left = [turn for each, turn in map(self.order.turn, waiting) if each == file]
            assert max(started, default=0) - min(left, default=max(started, default=0)) <= 3 * size


def trees_of_next_step(budget: StepBudget, spent: list[tuple[int, int]]) -> int:
    """From the trees and decoded tokens of all steps so far."""
    left = 0.0
    for _, decoded in spent:
        left = max(-budget.tokens / 2, min(budget.tokens / 2, left + budget.tokens - decoded))
    weighted = [(each[0] / 2**age, each[1] / 2**age) for age, each in enumerate(reversed(spent))]
    trees, tokens = map(sum, zip(*weighted, strict=True))
    return round(max(budget.least, min(budget.most, (budget.tokens + left) * trees / tokens)))


def can_take(
    run: ScheduleRun, version: int, growing: Mapping[int, int], ready: Mapping[int, int], least: int
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


def fit(run: ScheduleRun, version: int, began: list[int]) -> bool:
    """Whether the steps after the next one can train trees of these versions: the most urgent first."""
    left = sorted(each + run.max_staleness for each in began)
    step = version + 1
    while left:
        if left[0] < step:
            return False
        left, step = left[run.batch :], step + 1
    return True
