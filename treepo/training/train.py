"""A training run from its start to its summary; `treepo.training.loop` takes the steps.

A run is one attempt, or several: if the trainer is lost, the run goes back to its last checkpoint in this
process, as a resumed run does, and attempts the rest again with the same engines.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo.config.run import RunConfig
from treepo.data.daemon_thread import in_thread
from treepo.data.inputs import TrainInputs
from treepo.errors import LostTrainerError, TrainerError
from treepo.protocols import Trainer, TrainingEnginePool
from treepo.rewards.grade import Rewards
from treepo.rewards.pool import open_rewards
from treepo.rollout.driver import TreeDriver
from treepo.training.best_step import BestStep
from treepo.training.checkpoints import Checkpoints
from treepo.training.health import Health
from treepo.training.heldout import Heldout, PeriodicEvaluation
from treepo.training.log_prob_check import check_log_probs
from treepo.training.loop import TrainingLoop, record_evaluation
from treepo.training.metrics import heldout_metric
from treepo.training.resume import Resume, last_checkpoint, restore
from treepo.training.run_folder import METRICS, TREES, RunFolder
from treepo.training.run_state import CONTINUES, Clock, Reporter, RunState, Watched
from treepo.training.scheduler import Scheduler
from treepo.training.step_guard import StepGuard
from treepo.training.tree_grader import TreeGrader
from treepo.training.tree_supply import TreeSupply
from treepo.watchdog import Watchdog

Start = Callable[[], AbstractAsyncContextManager[tuple[TrainingEnginePool, Trainer]]]
"""Starts the engines and the trainer, and ends them on exit."""

_log = logging.getLogger(__name__)
_BACK_OFF_SECONDS = 5.0  # before the first restart of the trainer; twice as long before each further one,
_LONGEST_BACK_OFF_SECONDS = 60.0  # at most


async def train(
    config: RunConfig, inputs: TrainInputs, reporter: Reporter, start: Start, resume: Resume | None = None
) -> dict[str, Any]:
    """Train from the first step or from a checkpoint; write and return the summary.

    Everything that was started is ended, also after an error. Raises TrainerError if the trainer was lost
    more than `trainer.max_restarts` times.
    """
    state = RunState(inputs.train.fingerprint) if resume is None else resume.state
    watchdog = Watchdog(config.out, config.engine.stall_seconds, config.steps)
    async with AsyncExitStack() as stack:
        decode = inputs.tokenizer.decode
        folder = stack.enter_context(RunFolder(config, None if resume is None else state, decode))
        health = Health(config, folder.recorded())
        reporter = Watched(reporter, watchdog, config.steps, health)
        reporter.known(folder.recorded())
        clock = Clock(state, reporter)
        await stack.enter_async_context(watchdog)
        for line in inputs.summaries(config):
            _log.info(line)
        if resume is not None:
            _log.info("%s %d", CONTINUES, state.steps_done)
        with clock.phase("start engine and trainer", announce=True):
            # Rewards first: a reward function that cannot be imported is found within a second.
            rewards = await stack.enter_async_context(open_rewards(config.reward))
            engines, trainer = await stack.enter_async_context(start())
            watchdog.engines = engines.engines
        run = _Run(config, inputs, reporter, folder, rewards, engines, trainer)
        summary = await run.finish(state, clock, resume)
        await folder.write_summary(summary)
        reporter.phase("stop")
    return summary


@dataclass(slots=True)
class _Run:
    """What all attempts of a run share.

    check: the figures of the log-prob check, once it has passed. restarts: of the trainer in this process.
    at_start: the sizes of the growing files before the first step, once they are known.
    """

    config: RunConfig
    inputs: TrainInputs
    reporter: Reporter
    folder: RunFolder
    rewards: Rewards
    engines: TrainingEnginePool
    trainer: Trainer
    check: Mapping[str, float] | None = None
    restarts: int = 0
    at_start: Mapping[str, int] | None = None

    async def finish(self, state: RunState, clock: Clock, origin: Resume | None) -> dict[str, Any]:
        """Attempt the rest of the run until it is done; returns the summary.

        state: where it begins, which is that of `origin` if it resumes from a checkpoint.
        """
        lost: LostTrainerError | None = None
        while True:
            try:
                if lost is not None:
                    with clock.phase("restart trainer", announce=True):
                        await self._restart_trainer(state, origin)
                elif origin is not None:
                    with clock.phase(f"continue from {origin.checkpoint.name}", announce=True):
                        await restore(origin, self.engines, self.trainer)
                return await self._attempt(state, clock, origin)
            except (LostTrainerError, BaseExceptionGroup) as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():  # the group hides that the run is to end
                    raise
                lost = _lost_trainer(error)
            state, clock, origin = await self._go_back(lost, state)

    async def _attempt(self, state: RunState, clock: Clock, origin: Resume | None) -> dict[str, Any]:
        """Take the steps that are left and write the model; returns the summary. Engines and trainer have the
        weights of `state`.
        """
        config, engines, trainer = self.config, self.engines, self.trainer
        heldout = Heldout(config, self.inputs.heldout, self.inputs.tokenizer, engines, self.rewards)
        if config.log_prob_check.enabled and self.check is None:
            with clock.phase("check log-probs", announce=True):
                decode = self.inputs.tokenizer.decode
                self.check = await check_log_probs(
                    config, self.inputs.train, decode, engines.engines, trainer, engines.training
                )
        best = None if config.evaluation.best is None else BestStep(config, self.folder.recorded())
        checkpoints = Checkpoints(
            config.out, config.checkpoint, config.steps, trainer, self.folder.disk, best
        )
        if origin is None and self.at_start is None:
            state.accuracy_before = await self._evaluate(heldout, "before", 0, checkpoints, clock)
            self.at_start = await self.folder.sizes()
        loop = TrainingLoop(
            config=config,
            engines=engines,
            trainer=trainer,
            supply=self._supply(state, origin),
            evaluation=PeriodicEvaluation(config, heldout),
            checkpoints=checkpoints,
            guard=StepGuard(config),
            folder=self.folder,
            state=state,
            clock=clock,
            reporter=self.reporter,
        )
        await loop.run()
        accuracy_after = await self._evaluate(heldout, "after", config.steps, checkpoints, clock)
        with clock.phase("write model"):
            await checkpoints.settle()
            await self._export(self.folder.checkpoint)
            exported = await self._export_best(checkpoints)
        return state.summary(trainer.dtype, accuracy_after, exported, self.check)

    async def _evaluate(
        self, heldout: Heldout, when: str, step: int, checkpoints: Checkpoints, clock: Clock
    ) -> float | None:
        """Evaluate the served weights before or after training. Returns the accuracy on the first held-out
        set; None if there is none, or if no answer to it could be graded.
        """
        if heldout.empty:
            return None
        with clock.phase(f"evaluate {when}", announce=True):
            evaluation = await heldout.evaluate(f"evaluate {when}")
        await record_evaluation(step, evaluation, checkpoints, self.folder, self.reporter)
        first = next(iter(evaluation.trees))
        accuracy = evaluation.metrics[heldout_metric(first, "accuracy")]
        return accuracy if math.isfinite(accuracy) else None

    async def _export(self, folder: Path) -> None:
        path = folder.resolve()
        await self.folder.disk.until_done(lambda: self.trainer.export(path), str(path))

    async def _export_best(self, checkpoints: Checkpoints) -> Mapping[str, float] | None:
        """Write the model of the best checkpoint. Returns its step and accuracy; None without one."""
        best = await checkpoints.best()
        if best is None:
            return None
        step, accuracy, folder = best
        if step != self.config.steps:  # whose weights the trainer has
            async with self.engines.training():
                await self.trainer.load(folder)
        await self._export(self.folder.best)
        return {"step": step, "accuracy": accuracy}

    def _supply(self, state: RunState, origin: Resume | None) -> TreeSupply:
        """The supply of trees that begins as the state says."""
        config, inputs, engines = self.config, self.inputs, self.engines
        order = inputs.train.order(config.seed)
        scheduler = Scheduler.of_run(config, order, state.steps_done, state.schedule)
        if scheduler.resampled:
            state.resampled += scheduler.resampled
            _log.warning("%d finished trees are too stale now and are sampled again", scheduler.resampled)
        tokenizer, sampling = inputs.tokenizer, config.sampling
        grader = TreeGrader(config.reward, tokenizer, self.rewards, sampling.max_response_tokens)
        driver = TreeDriver(
            engines.engines,
            sampling,
            tokenizer.decode,
            config.seed,
            engines.kv_tokens,
            grader.grade_response,
            routes=config.samples_routes,
        )
        finished = {} if origin is None else origin.ready_trees
        return TreeSupply(config, inputs.train, order, scheduler, driver, grader, finished)

    async def _go_back(
        self, lost: LostTrainerError, state: RunState
    ) -> tuple[RunState, Clock, Resume | None]:
        """Go back to the last checkpoint, or to the start of the run if there is none, and wait a while.

        Raises TrainerError if `trainer.max_restarts` are used up.
        """
        most = self.config.trainer.max_restarts
        origin = await in_thread(lambda: last_checkpoint(self.config))
        if self.restarts == most:
            goes_on = "" if origin is None else f"; --resume continues after step {origin.state.steps_done}"
            used_up = f"trainer.max_restarts = {most}: all restarts are used up"
            raise TrainerError(f"{lost}; {used_up}{goes_on}") from lost
        self.restarts += 1
        earlier = self._state_at_start(state) if origin is None else origin.state
        earlier.trainer_restarts = state.trainer_restarts + 1
        earlier.seconds, earlier.phase_seconds = state.seconds, state.phase_seconds  # they have passed
        whence = "from the start" if origin is None else f"after step {earlier.steps_done}"
        _log.warning("%s; the run goes on %s (restart %d of %d)", lost, whence, self.restarts, most)
        back, path = (lambda: in_thread(lambda: self.folder.go_back(earlier))), str(self.folder.path)
        await self.folder.disk.until_done(back, path)
        clock = Clock(earlier, self.reporter)
        await asyncio.sleep(min(_BACK_OFF_SECONDS * 2 ** (self.restarts - 1), _LONGEST_BACK_OFF_SECONDS))
        return earlier, clock, origin

    def _state_at_start(self, state: RunState) -> RunState:
        """The state of a run that has taken no step, whose growing files have the evaluation before training
        at most.
        """
        if self.at_start is not None:
            return RunState(state.data, accuracy_before=state.accuracy_before, sizes=dict(self.at_start))
        return RunState(state.data, sizes={METRICS: 0, TREES: 0})

    async def _restart_trainer(self, state: RunState, origin: Resume | None) -> None:
        """Start the trainer again, and give it and the engines the weights of `state`."""
        async with self.engines.restarted_trainer():
            if origin is not None:
                await self.trainer.load(origin.checkpoint.resolve())
            await self.engines.sync_weights(state.steps_done)


def _lost_trainer(error: LostTrainerError | BaseExceptionGroup) -> LostTrainerError:
    """The loss of the trainer, also if several tasks failed with it. Raises `error` if anything else
    failed.
    """
    if isinstance(error, BaseExceptionGroup):
        lost, other = error.split(LostTrainerError)
        if lost is None or other is not None:
            raise error
        error = lost
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
    assert isinstance(error, LostTrainerError)
    return error
