"""The synchronous loop: sample trees, grade them, learn, hand the new weights to the engines; again."""

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

from treepo.cluster.placement import run_layout
from treepo.cluster.ray_engine import EnginePool
from treepo.cluster.ray_session import ray_session
from treepo.cluster.reservation import reserve
from treepo.cluster.trainer_group import TrainerGroup
from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import PromptOrder
from treepo.errors import PlacementError
from treepo.evaluation.metrics import evaluation_sampling
from treepo.preflight.train import Inputs
from treepo.rewards.failures import FailedGrades
from treepo.rewards.pool import open_rewards
from treepo.rollout.driver import TreeDriver
from treepo.rollout.stopping import StopRule
from treepo.training.checkpoints import Checkpoints
from treepo.training.clock import Clock, Reporter
from treepo.training.resume import Resume
from treepo.training.run import Run
from treepo.training.run_folder import RunFolder

_log = logging.getLogger(__name__)


async def train(
    config: RunConfig, inputs: Inputs, reporter: Reporter, resume: Resume | None = None
) -> dict[str, Any]:
    """Run `config` from its first step, or from where it goes on, to its summary: written and returned.

    Everything that is started here is ended here, whatever happens.
    """
    clock = Clock(reporter)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(RunFolder(config, resume.state if resume else None))
        for report in inputs.reports:
            _log.info(report.summary())
        with clock.phase("start engine and trainer", announce=True):
            run = await _start(config, inputs, folder, clock, stack)
        if resume is not None:
            await run.go_on(resume)
        difference = await run.check_log_probs()
        if resume is None:
            run.accuracy_before = await run.evaluate("evaluate before")
        for step in range(run.steps_done + 1, config.steps + 1):
            metrics = await run.step(step)
            folder.write_metrics(step, metrics)
            reporter.step(step, metrics)
            if run.checkpoints.due(step):
                await run.begin_checkpoint()
        await run.finish_checkpoint()
        after = await run.evaluate("evaluate after")
        with clock.phase("write model"):
            await run.trainer.export(folder.checkpoint.resolve())
        summary = {
            "accuracy_before": run.accuracy_before,
            "accuracy_after": after,
            "seconds": clock.total(),
            "steps": config.steps,
            "decoded_tokens": run.decoded_tokens,
            "sequential_tokens": run.sequential_tokens,
            "log_prob_check": difference,
            "max_logprob_difference": run.max_difference,
            "phase_seconds": clock.seconds,
        }
        folder.write_summary(summary)
        reporter.phase("stop")
    return summary


async def _start(
    config: RunConfig, inputs: Inputs, folder: RunFolder, clock: Clock, stack: AsyncExitStack
) -> Run:
    """The grader, then engines and trainer."""
    # First, because it takes a second to know of a reward function that cannot be imported.
    rewards = await stack.enter_async_context(open_rewards(config.reward))
    stack.enter_context(ray_session(config.engine.count + config.trainer.parallel.ranks))
    engines, trainer = await _start_processes(config, inputs, stack)

    def driver(sampling: SamplingConfig) -> TreeDriver:
        decode = inputs.tokenizer.decode
        return TreeDriver(engines.engines, sampling, decode, config.seed, engines.capacity)

    run = Run(
        config,
        inputs,
        folder,
        clock,
        rewards,
        engines,
        trainer,
        checkpoints=Checkpoints(config.out, config.checkpoint, config.steps, trainer),
        order=PromptOrder(len(inputs.train), config.seed),
        training=driver(config.sampling),
        evaluation=driver(evaluation_sampling(config)),
        failed_grades=FailedGrades(config.reward.max_failed_share),
    )
    engines.restore = run.restore
    return run


async def _start_processes(
    config: RunConfig, inputs: Inputs, stack: AsyncExitStack
) -> tuple[EnginePool, TrainerGroup]:
    """Engines and trainer at the same time; where they share devices, the engines' caches take what the
    trainer leaves.
    """
    seats = await reserve(run_layout(config), config.engine.start_seconds)
    if config.weights.transport == "colocated" and not seats.one_machine:
        raise PlacementError(
            "weights.transport = colocated: some engine is on another machine than trainer rank 0, which "
            f"sends; {'host_broadcast' if seats.shared else 'broadcast, host_broadcast'} and disk are allowed"
        )
    trainer = TrainerGroup(config, seats.ranks)
    devices: list[str] = []
    if seats.shared:
        if config.weights.transport == "broadcast":
            raise PlacementError(
                "placement = colocated with weights.transport = broadcast: NCCL takes one process a GPU; "
                "colocated, host_broadcast and disk are allowed"
            )
        await trainer.ready()
        devices = await trainer.devices()
    stop_rule = StopRule(config.sampling, inputs.tokenizer.decode)
    engines = EnginePool(config, stop_rule, seats.for_engines(devices), seats.shared)
    stack.push_async_callback(engines.close)
    if seats.shared:
        await engines.ready()
    else:
        await asyncio.gather(engines.ready(), trainer.ready())
    return engines, trainer
