"""Which prompt starts a tree next, and which trees are trained next. Pure: no clock, no engine, no Ray.

A tree is known by the position of its prompt in the training order. From its start until a step takes it or
it is dropped, it is growing or ready. Step s trains under weight version s - 1, and a tree that began with
version v may be trained until step v + max_staleness + 1: that is its last step.

Two rules keep the bound. A tree starts only if the steps that are left to it have room for it and for all
trees before it. A step takes the oldest ready trees, and waits for a growing one only if a later step would
have no room for all whose last step it is. If trees are trained at the step after their start and none is
left over, this is the synchronous loop.

A failed or dropped tree is not sampled again: another position replaces it. A position waits while its prompt
has another untrained tree. Later ones of its file start meanwhile, none a whole epoch after it, so that
epochs do not drift apart.

The files of a mixture start as many trees as the order gives them turns, whichever of their positions these
are. If none of a file's prompts may start, the others go on without it by at most `max_untrained` positions,
and it catches up as soon as it can.

With a budget of decoded tokens a step, the number of a step's trees follows from what the steps before it
decoded (`treepo.training.step_budget`). All trees of a step are then trained or lost before the next begins.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, Self

from pydantic import ConfigDict

from treepo.config.run import RunConfig
from treepo.data.prompt_order import TrainingOrder
from treepo.training.step_budget import Spending, StepBudget


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """What a checkpoint keeps of the schedule. Every position below `cursor` is here, or a step has taken or
    counted it, or its tree failed.

    again: positions whose trees are to be started, ascending. ready: positions of finished trees.
    began: the version that each of `ready` began with. dropped: positions of trees that were dropped since
    the last step took its trees. spent: of the budget of decoded tokens a step, if there is one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    cursor: int = 0
    again: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    began: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    spent: Spending = field(default_factory=Spending)

    def check(self, version: int) -> None:
        """Raise ValueError if no schedule at `version` has this state."""
        if self.cursor < 0:
            raise ValueError("schedule: cursor cannot be negative")
        positions = [*self.again, *self.ready, *self.dropped]
        if len(set(positions)) != len(positions) or not all(0 <= each < self.cursor for each in positions):
            raise ValueError("schedule: again, ready and dropped must be different positions below cursor")
        if len(self.began) != len(self.ready) or not all(0 <= each <= version for each in self.began):
            raise ValueError("schedule: began must be a version of each ready tree, at most steps_done")
        self.spent.check()


class Scheduler:
    """Schedules the trees of one run.

    order: the training order, of at least `batch` prompts; of a mixture, each file has at least as many as it
    has turns among `batch` positions. A prompt has one untrained tree at a time, and begins one under each
    version: another would draw the same random numbers. batch: trees of one step.
    max_untrained: most trees that are started and not trained, at any time; from batch to
    batch x (max_staleness + 1). max_refills: most dropped trees that others replace in one step, as a
    multiple of batch; every further one makes the step's batch smaller. steps: of the run.
    budget: changes batch from step to step, and max_untrained with it, which must be the same then.

    version: that the engines serve. resampled: finished trees of the restored state that are too stale now.
    """

    def __init__(
        self,
        order: TrainingOrder,
        *,
        batch: int,
        max_staleness: int,
        max_untrained: int,
        max_refills: int,
        steps: int,
        version: int = 0,
        budget: StepBudget | None = None,
        state: ScheduleState | None = None,
    ) -> None:
        state = state or ScheduleState()
        self._budget, self._spent = budget, state.spent
        if budget is not None:
            assert batch == max_untrained
            batch = max_untrained = budget.trees(state.spent)
        assert batch <= max_untrained <= batch * (max_staleness + 1)
        self.version = version
        self.resampled = 0
        self._order, self._batch, self._steps = order, batch, steps
        self._max_staleness, self._max_untrained = max_staleness, max_untrained
        self._max_refills = max_refills
        self._growing: dict[int, int] = {}  # positions, and the versions that their trees began with
        self._ready: dict[int, int] = {}
        self._busy: set[int] = set()  # prompts of both
        self._begun: set[int] = set()  # prompts that have begun a tree under this version
        self._training = False
        self._cursor = state.cursor
        self._waiting: list[list[int]] = [[] for _ in order.sizes]  # positions to be started, of each file
        for position in sorted(state.again):
            self._wait(position)
        self._dropped = list(state.dropped)
        self._restore(dict(zip(state.ready, state.began, strict=True)))

    @classmethod
    def of_run(cls, config: RunConfig, order: TrainingOrder, version: int, state: ScheduleState) -> Self:
        """The scheduler of a training run that begins, or continues after step `version`."""
        return cls(
            order,
            batch=config.data.prompts_per_step,
            max_staleness=config.loop.max_staleness,
            max_untrained=config.max_untrained,
            max_refills=config.learning.max_refills,
            steps=config.steps,
            version=version,
            budget=_budget(config, order),
            state=state,
        )

    @property
    def batch(self) -> int:
        """Number of trees of the next step, or of the one that is being trained."""
        return self._batch

    @property
    def growing(self) -> int:
        """Number of trees that have started and not finished."""
        return len(self._growing)

    @property
    def ready(self) -> Collection[int]:
        """Positions of the finished trees that wait for a step."""
        return self._ready.keys()

    @property
    def dropped(self) -> Collection[int]:
        """Positions of the trees that were dropped since the last step took its trees."""
        return self._dropped

    def next(self) -> int | None:
        """The position to start next; None until a tree ends or a step is taken or trained."""
        if len(self._busy) >= self._room():
            return None
        order, waiting = self._order, self._waiting
        started = [order.turns_before(file, self._cursor) - len(each) for file, each in enumerate(waiting)]
        due = sorted((order.position(file, turn), file) for file, turn in enumerate(started))
        for position, file in due:
            if position > due[0][0] + self._max_untrained:
                break
            if (found := self._free(file, waiting[file])) is not None:
                return found
        return None

    def start(self, position: int) -> None:
        """Start the tree at the position that `next` returned."""
        if position < self._cursor:
            waiting = self._waiting[self._order.turn(position)[0]]
            del waiting[bisect_left(waiting, position)]
        else:  # the positions that were passed over wait until their prompt may begin again
            for passed in range(self._cursor, position):
                self._wait(passed)
            self._cursor = position + 1
        self._growing[position] = self.version
        self._busy.add(self._order.index(position))
        self._begun.add(self._order.index(position))

    def finish(self, position: int) -> None:
        """A tree has finished and can be trained."""
        self._ready[position] = self._growing.pop(position)

    def drop(self, position: int) -> None:
        """A tree has finished and has nothing to teach."""
        self.fail(position)
        self._dropped.append(position)

    def fail(self, position: int) -> None:
        """A tree was given up. Others replace all that fail."""
        del self._growing[position]
        self._busy.remove(self._order.index(position))

    def take(self) -> Mapping[int, int] | None:
        """Take the trees of the next step: ascending positions, with the version that each began with.

        None: wait until another tree finishes. They are fewer than a batch if no further tree can begin, or
        replace a dropped one. `trained` ends the step.
        """
        assert not self._training, "the last step is still being trained"
        least = self._batch - self._unreplaced()
        if len(self._ready) < max(least, 1) and (self._growing or self.next() is not None):
            return None
        growing = Counter(self._growing.values())
        for spare in range(self._max_staleness + 1):
            began = self.version + spare - self._max_staleness
            # The `spare` steps after this one have no room for more of the trees that began by then.
            if sum(trees for version, trees in growing.items() if version <= began) > spare * self._batch:
                return None
        oldest = sorted(self._ready, key=lambda position: (self._ready[position], position))
        taken = {position: self._ready.pop(position) for position in sorted(oldest[: self._batch])}
        self._busy.difference_update(map(self._order.index, taken))
        self._training = True
        self._dropped.clear()
        return taken

    def trained(self, decoded_tokens: int | None = None) -> None:
        """The step is trained, and the engines serve its weights.

        decoded_tokens: in sampling the step, all that was dropped or failed included; a budget needs it.
        """
        assert self._training
        if self._budget is not None:
            assert decoded_tokens is not None
            assert not self._busy, "a tree would be of two steps"
            self._spent = self._budget.after(self._spent, self._batch, decoded_tokens)
            self._batch = self._max_untrained = self._budget.trees(self._spent)
        self._training = False
        self.version += 1
        self._begun.clear()

    def state(self) -> ScheduleState:
        """The schedule between two steps. Trees that grow are started again."""
        assert not self._training
        ready = sorted(self._ready)
        return ScheduleState(
            self._cursor,
            sorted(chain(self._growing, *self._waiting)),
            ready,
            [self._ready[position] for position in ready],
            sorted(self._dropped),
            self._spent,
        )

    def _wait(self, position: int) -> None:
        """A position below the cursor is to be started."""
        insort(self._waiting[self._order.turn(position)[0]], position)

    def _free(self, file: int, waiting: Sequence[int]) -> int | None:
        """The first position of a file whose prompt may begin a tree, less than an epoch after the first that
        waits.
        """
        order, next_turn = self._order, self._order.turns_before(file, self._cursor)
        limit = (order.turn(waiting[0])[1] if waiting else next_turn) + order.sizes[file]
        earlier = (each for each in waiting if order.turn(each)[1] < limit)
        later = (order.position(file, turn) for turn in range(next_turn, limit))
        return next((each for each in chain(earlier, later) if self._may_begin(order.index(each))), None)

    def _may_begin(self, prompt: int) -> bool:
        return prompt not in self._busy and prompt not in self._begun

    def _unreplaced(self) -> int:
        """Dropped trees of this step that no other tree replaces."""
        return min(max(len(self._dropped) - self._max_refills * self._batch, 0), self._batch)

    def _room(self) -> int:
        """Most trees that may grow or be ready now."""
        trained = self.version + self._training
        left = (self._steps - trained) * self._batch
        return min(self._max_untrained - self._training * self._batch, left) - self._unreplaced()

    def _restore(self, began: Mapping[int, int]) -> None:
        """Keep the finished trees of a checkpoint, the oldest first, for which the bound leaves a step."""
        oldest = sorted(began, key=lambda position: (began[position], position))
        for position in oldest:
            spare = began[position] + self._max_staleness - self.version
            if len(self._ready) < (spare + 1) * self._batch:
                self._ready[position] = began[position]
                self._busy.add(self._order.index(position))
            else:
                self._wait(position)
                self.resampled += 1


def _budget(config: RunConfig, order: TrainingOrder) -> StepBudget | None:
    """Each replica has a tree in each mini-batch, and no file has more turns in a step than prompts."""
    tokens = config.data.decoded_tokens_per_step
    if tokens is None:
        return None
    least = config.learning.mini_batches * config.trainer.parallel.data
    return StepBudget(tokens, config.data.prompts_per_step, least, order.largest_step)
