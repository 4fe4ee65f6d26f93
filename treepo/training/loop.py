"""The steps of a training run: take trees, learn from them, serve the new weights, save.

In a synchronous run the engines sample only while the loop waits for trees; in an asynchronous one they
sample the trees of later steps while the trainer learns. Everything else is the same.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace

from treepo.config.run import RunConfig
from treepo.protocols import BatchResult, Trainer, TrainingEnginePool
from treepo.training.checkpoints import Checkpoints
from treepo.training.heldout import Evaluation, PeriodicEvaluation
from treepo.training.kl_reward import with_kl_in_rewards
from treepo.training.metrics import file_metrics, step_metrics
from treepo.training.mini_batches import mini_batches
from treepo.training.ready_trees import ready_trees_lines
from treepo.training.run_folder import RunFolder
from treepo.training.run_state import Clock, Reporter, RunState
from treepo.training.step_guard import StepGuard
from treepo.training.tree_supply import TreeSupply
from treepo.tree import Tree


@dataclass(frozen=True, slots=True)
class TrainingLoop:
    """Everything that a run's steps use. `state` says where they begin, and follows them."""

    config: RunConfig
    engines: TrainingEnginePool
    trainer: Trainer
    supply: TreeSupply
    evaluation: PeriodicEvaluation
    checkpoints: Checkpoints
    guard: StepGuard
    folder: RunFolder
    state: RunState
    clock: Clock
    reporter: Reporter

    async def run(self) -> None:
        """Take the steps that are left."""
        self.clock.take_step_seconds()
        await self.checkpoints.mark_best()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.supply.running(self.engines))
            stack.push_async_callback(self.evaluation.cancel)
            stack.push_async_callback(self.checkpoints.cancel)
            await self._evaluate(self.state.steps_done)  # a checkpoint is older than its step's evaluation
            for step in range(self.state.steps_done + 1, self.config.steps + 1):
                await self._step(step)
                await self.folder.keeps_up()
                if self.checkpoints.due(step):
                    await self._begin_checkpoint()
                await self._evaluate(step)
            await self._finish_checkpoint()

    async def _step(self, step: int) -> None:
        with self.clock.phase("sample"):
            batch = await self.supply.batch(step)
        for finished in batch.sampled:
            self.folder.write_tree(finished.tree, step, finished.answer)
        await self._finish_checkpoint()  # of the step before
        result = await self._learn(batch.trained, step)
        sampled = self.supply.take_sampled()
        self.supply.trained(sampled.stats.decoded_tokens)
        self.state.step_done(step, sampled.stats, result)
        seconds = self.clock.take_step_seconds()
        metrics = step_metrics(batch, sampled, result, *seconds, self.state.trainer_restarts)
        names = [file.label for file in self.config.data.mixture]
        metrics |= file_metrics([finished.tree for finished in batch.sampled], names)
        self.folder.write_metrics(step, metrics)
        self.reporter.step(step, metrics)

    async def _learn(self, trees: Sequence[Tree], step: int) -> BatchResult:
        """Train on graded trees, then make the engines serve the new weights as version `step`.

        Raises RewardError if no response could be graded, and DivergedError as `StepGuard` says: the engines
        do not get the weights then.
        """
        with ExitStack() as paused:
            if self._synchronous:
                paused.enter_context(self.supply.paused())
            async with self.engines.training():
                with self.clock.phase("log-probs"):
                    trained, kl = trees, None
                    if self.config.learning.kl_in == "reward":
                        trained, kl = await with_kl_in_rewards(trees, self.trainer, self.config)
                    parts = mini_batches(trained, self.config)
                self.clock.show("log-probs, train")
                result = await self.trainer.train_batch(parts, self.config.sampling.temperature)
                if kl is not None:
                    updates = [{**update, "reference_kl": kl} for update in result.updates]
                    result = replace(result, updates=updates)
                self.clock.count("log-probs", result.seconds["log_probs"])
                self.clock.count("train", result.seconds["train"])
                self.guard.check(step, trees, result)
                await self._finish_evaluation()  # of the weights that the engines still serve
                if not self._synchronous:
                    paused.enter_context(self.supply.paused())
                with self.clock.phase("weight sync"):
                    await self.engines.sync_weights(step)
        return result

    @property
    def _synchronous(self) -> bool:
        return self.config.loop.mode == "sync"

    async def _begin_checkpoint(self) -> None:
        with self.clock.phase("write checkpoint"):
            self.state.sizes = await self.folder.sizes()
            self.state.schedule, ready_trees = self.supply.state()
            await self.checkpoints.begin(self.state, ready_trees_lines(ready_trees))

    async def _finish_checkpoint(self) -> None:
        with self.clock.phase("write checkpoint"):
            await self.checkpoints.finish()

    async def _evaluate(self, step: int) -> None:
        """Evaluate the weights of a step if that is due; in an asynchronous run, only begin."""
        if self.evaluation.due(step):
            self.evaluation.begin(step)
            if self._synchronous:
                with self.supply.paused():
                    await self._finish_evaluation()

    async def _finish_evaluation(self) -> None:
        if self.evaluation.running:
            with self.clock.phase("evaluate"):
                step, evaluation = await self.evaluation.finish()
            if evaluation is not None:
                await record_evaluation(step, evaluation, self.checkpoints, self.folder, self.reporter)


async def record_evaluation(
    step: int, evaluation: Evaluation, checkpoints: Checkpoints, folder: RunFolder, reporter: Reporter
) -> None:
    """Write and show what an evaluation after a step has found; step 0: before training."""
    metrics = dict(evaluation.metrics)
    best = await checkpoints.evaluated(step, metrics)
    if best is not None:
        metrics["heldout/best_step"] = best
    await folder.write_evaluation(evaluation.trees, step)
    folder.write_metrics(step, metrics)
    reporter.evaluated(step, metrics)
