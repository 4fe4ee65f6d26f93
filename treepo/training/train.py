"""The synchronous loop: sample trees, grade them, learn from them, give the engines the new weights."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from treepo.config.run import RunConfig
from treepo.data.inputs import TrainInputs
from treepo.data.prompts import Prompt, PromptOrder
from treepo.evaluation.metrics import evaluation_sampling
from treepo.protocols import Trainer, TrainingEnginePool
from treepo.rewards.pool import open_rewards
from treepo.training.batch import BatchSampler
from treepo.training.checkpoints import Checkpoints
from treepo.training.graded_trees import GradedSampler
from treepo.training.learn import learn
from treepo.training.log_prob_check import check_log_probs
from treepo.training.metrics import accuracy, step_metrics
from treepo.training.resume import Resume, restore
from treepo.training.run_folder import RunFolder
from treepo.training.run_state import Clock, Reporter, RunState

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
        order = PromptOrder(len(inputs.train), config.seed, state.cursor)
        sampler = GradedSampler(config, config.sampling, inputs.tokenizer, engines, rewards)
        batches = BatchSampler(config, inputs.train, order, sampler, folder)
        heldout = GradedSampler(config, evaluation_sampling(config), inputs.tokenizer, engines, rewards)
        checkpoints = Checkpoints(config.out, config.checkpoint, config.steps, trainer)
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
            state.accuracy_before = await _evaluate(heldout, inputs.heldout, "evaluate before", clock)

        for step in range(state.steps_done + 1, config.steps + 1):
            with clock.phase("sample"):
                batch = await batches.sample(step)
            with clock.phase("write checkpoint"):  # of the step before
                await checkpoints.finish()
            result = await learn(batch.trained, step, config, engines, trainer, clock)
            state.step_done(step, batch.stats, result)
            state.cursor = order.cursor
            metrics = step_metrics(batch, result, clock.take_step_seconds())
            folder.write_metrics(step, metrics)
            reporter.step(step, metrics)
            if checkpoints.due(step):
                with clock.phase("write checkpoint"):
                    state.sizes = folder.sizes()
                    await checkpoints.begin(state)

        with clock.phase("write checkpoint"):
            await checkpoints.finish()
        accuracy_after = await _evaluate(heldout, inputs.heldout, "evaluate after", clock)
        with clock.phase("write model"):
            await trainer.export(folder.checkpoint.resolve())
        summary = state.summary(trainer.dtype, accuracy_after, check)
        folder.write_summary(summary)
        reporter.phase("stop")
    return summary


async def _evaluate(
    sampler: GradedSampler, prompts: Sequence[Prompt], phase: str, clock: Clock
) -> float | None:
    """Return the accuracy of the served weights on held-out prompts; None if there are none.

    Every evaluation samples as step 0, with the same seeds.
    """
    if not prompts:
        return None
    with clock.phase(phase, announce=True):
        trees = await sampler.sample(prompts, step=0)
        sampler.check_grades(phase)
        return accuracy(trees)
