"""A training run from its start to its summary; `treepo.training.loop` takes the steps."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from treepo.config.run import RunConfig
from treepo.data.inputs import TrainInputs
from treepo.data.prompts import PromptOrder
from treepo.protocols import Trainer, TrainingEnginePool
from treepo.rewards.grade import Rewards
from treepo.rewards.pool import open_rewards
from treepo.rollout.driver import TreeDriver
from treepo.training.checkpoints import Checkpoints
from treepo.training.heldout import Heldout, PeriodicEvaluation
from treepo.training.log_prob_check import check_log_probs
from treepo.training.loop import TrainingLoop
from treepo.training.resume import Resume, restore
from treepo.training.run_folder import RunFolder
from treepo.training.run_state import Clock, Reporter, RunState
from treepo.training.scheduler import Scheduler
from treepo.training.step_guard import StepGuard
from treepo.training.tree_grader import TreeGrader
from treepo.training.tree_supply import TreeSupply

Start = Callable[[], AbstractAsyncContextManager[tuple[TrainingEnginePool, Trainer]]]
"""Starts the engines and the trainer, and ends them on exit."""

_log = logging.getLogger(__name__)


async def train(
    config: RunConfig, inputs: TrainInputs, reporter: Reporter, start: Start, resume: Resume | None = None
) -> dict[str, Any]:
    """Train from the first step or from a checkpoint; write and return the summary.

    Everything that was started is ended, also after an error.
    """
    state = RunState(inputs.train.report.fingerprint) if resume is None else resume.state
    clock = Clock(state, reporter)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(RunFolder(config, None if resume is None else state))
        for report in inputs.reports:
            _log.info(report.summary())
        with clock.phase("start engine and trainer", announce=True):
            # Rewards first: a reward function that cannot be imported is found within a second.
            rewards = await stack.enter_async_context(open_rewards(config.reward))
            engines, trainer = await stack.enter_async_context(start())
        heldout = Heldout(config, inputs.heldout, inputs.tokenizer, engines, rewards)
        if resume is not None:
            with clock.phase(f"continue from {resume.checkpoint.name}", announce=True):
                await restore(resume, engines, trainer)
        check = None
        if config.log_prob_check.enabled:
            with clock.phase("check log-probs", announce=True):
                decode = inputs.tokenizer.decode
                check = await check_log_probs(
                    config, inputs.train, decode, engines.engines, trainer, engines.training
                )
        if resume is None:
            state.accuracy_before = await _evaluate(heldout, "evaluate before", clock)
        loop = TrainingLoop(
            config=config,
            engines=engines,
            trainer=trainer,
            supply=_supply(config, inputs, engines, rewards, state, resume),
            evaluation=PeriodicEvaluation(config, heldout),
            checkpoints=Checkpoints(config.out, config.checkpoint, config.steps, trainer),
            guard=StepGuard(config),
            folder=folder,
            state=state,
            clock=clock,
            reporter=reporter,
        )
        await loop.run()
        accuracy_after = await _evaluate(heldout, "evaluate after", clock)
        with clock.phase("write model"):
            await trainer.export(folder.checkpoint.resolve())
        summary = state.summary(trainer.dtype, accuracy_after, check)
        folder.write_summary(summary)
        reporter.phase("stop")
    return summary


def _supply(
    config: RunConfig,
    inputs: TrainInputs,
    engines: TrainingEnginePool,
    rewards: Rewards,
    state: RunState,
    resume: Resume | None,
) -> TreeSupply:
    """The supply of trees that begins as the state says."""
    order = PromptOrder(len(inputs.train), config.seed)
    scheduler = Scheduler.of_run(config, order, state.steps_done, state.schedule)
    if scheduler.resampled:
        state.resampled += scheduler.resampled
        _log.warning("%d finished trees are too stale now and are sampled again", scheduler.resampled)
    tokenizer, sampling = inputs.tokenizer, config.sampling
    driver = TreeDriver(engines.engines, sampling, tokenizer.decode, config.seed, engines.kv_tokens)
    grader = TreeGrader(config.reward, tokenizer, rewards, sampling.max_response_tokens)
    finished = {} if resume is None else resume.ready_trees
    return TreeSupply(config, inputs.train, order, scheduler, driver, grader, finished)


async def _evaluate(heldout: Heldout, phase: str, clock: Clock) -> float | None:
    """Return the accuracy of the served weights on the held-out prompts; None if there are none."""
    if not heldout.prompts:
        return None
    with clock.phase(phase, announce=True):
        return await heldout.accuracy(phase)
