"""The synchronous loop: sample trees, grade them, learn, hand the new weights to the engines; again."""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Protocol

from treepo.config.schema import RunConfig
from treepo.data import PromptOrder, load_prompts
from treepo.orchestration.cluster import ray_session
from treepo.orchestration.engines import EnginePool
from treepo.orchestration.learners import LearnerGroup
from treepo.orchestration.run_folder import RunFolder
from treepo.rewards.pool import RewardPool
from treepo.stopping import StopRule
from treepo.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Whoever shows the run to a person."""

    def phase(self, name: str, announce: bool = False) -> None:
        """What the run does from now on; `announce` where it lasts long and comes once."""

    def note(self, text: str) -> None:
        """Something that a person should read."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""


class Clock:
    """Seconds spent in each phase; tells the reporter which phase it is."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, announce: bool = False) -> Iterator[None]:
        self._reporter.phase(name, announce)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


async def train(config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    """Run `config` from its first step to its summary, which is returned and written.

    Everything that is started here is ended here, whatever happens.
    """
    clock = Clock(reporter)
    started = time.perf_counter()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(RunFolder(config))
        with clock.phase("start engine and actor", announce=True):
            run = await _start(config, reporter, folder, stack)
        before = await run.evaluate(clock, "evaluate before")
        for step in range(1, config.steps + 1):
            metrics = await run.step(step, clock)
            folder.write_metrics(step, metrics)
            reporter.step(step, metrics)
        after = await run.evaluate(clock, "evaluate after")
        with clock.phase("write checkpoint"):
            await run.learner.export(folder.checkpoint.resolve())
        summary = {
            "accuracy_before": before,
            "accuracy_after": after,
            "seconds": time.perf_counter() - started,
            "steps": config.steps,
            "decoded_tokens": run.decoded_tokens,
            "sequential_tokens": run.sequential_tokens,
            "max_logprob_difference": run.max_difference,
            "phase_seconds": clock.seconds,
        }
        folder.write_summary(summary)
        reporter.phase("stop engine and actor")
    return summary


async def _start(config: RunConfig, reporter: Reporter, folder: RunFolder, stack: AsyncExitStack) -> "Run":
    """Start grader, engines and trainer at the same time, and read the data meanwhile."""
    rewards = RewardPool(config.reward)
    stack.push_async_callback(rewards.close)
    stack.enter_context(ray_session(config))
    tokenizer = load_tokenizer(config.model.path)
    engines = EnginePool(config, StopRule(config.sampling, tokenizer.decode))
    stack.push_async_callback(engines.close)
    learner = LearnerGroup(config)
    stack.push_async_callback(learner.close)
    run = Run(config, tokenizer, folder, rewards, engines, learner)
    await asyncio.gather(engines.ready(), learner.ready())
    return run


class Run:
    """What a run holds between its steps."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        folder: RunFolder,
        rewards: RewardPool,
        engines: EnginePool,
        learner: LearnerGroup,
    ) -> None:
        self._config = config
        self._folder = folder
        self._rewards = rewards
        self._engines = engines
        self.learner = learner
        self._decode = tokenizer.decode
        self._prompts = load_prompts(config.data.train, config.data.columns, tokenizer, config.data)
        self._heldout = (
            load_prompts(config.data.heldout, config.data.heldout_columns, tokenizer, config.data)
            if config.data.heldout
            else None
        )
        self._order = PromptOrder(len(self._prompts), config.seed)
        self._driver = self._new_driver(config.sampling)
        self.decoded_tokens = 0
        self.sequential_tokens = 0
        self.max_difference = 0.0
