"""What a training run holds between its steps, and what one step does with it."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from treepo.cluster.ray_engine import EnginePool, RemoteEngine
from treepo.cluster.trainer_group import TrainerGroup
from treepo.config.run import RunConfig
from treepo.data.prompts import Prompt, PromptOrder
from treepo.errors import EngineError, RewardError
from treepo.learning.advantage import estimate
from treepo.learning.dynamic_sampling import Dropped, DynamicSampler
from treepo.learning.loss import denominator
from treepo.learning.mismatch import log_prob_mismatch
from treepo.learning.packing import Pack, attach, pack_flat, pack_trees, split_mini_batches
from treepo.preflight.train import Inputs
from treepo.rewards.failures import FailedGrades
from treepo.rewards.grade import GradeItem, Rewards
from treepo.rewards.shaping import shaped, with_grades
from treepo.rollout.driver import FailedTree, Stats, TreeDriver
from treepo.rollout.watchdog import watched
from treepo.training.checkpoints import Checkpoints, RunState
from treepo.training.clock import Clock
from treepo.training.log_prob_check import check_log_probs
from treepo.training.metrics import accuracy, tree_metrics
from treepo.training.resume import Resume
from treepo.training.run_folder import RunFolder
from treepo.tree import Tree
from treepo.weight_sync.transaction import sync_weights, update_weights


@dataclass(slots=True, eq=False)
class Run:
    """What a run holds between its steps."""

    config: RunConfig
    inputs: Inputs
    folder: RunFolder
    clock: Clock
    rewards: Rewards
    engines: EnginePool
    trainer: TrainerGroup
    checkpoints: Checkpoints
    order: PromptOrder
    training: TreeDriver
    evaluation: TreeDriver
    failed_grades: FailedGrades
    steps_done: int = 0
    accuracy_before: float | None = None
    decoded_tokens: int = 0
    sequential_tokens: int = 0
    max_difference: float = 0.0

    async def restore(self, process: RemoteEngine) -> None:
        """Give a restarted engine, which has the model folder's weights, those that the others serve."""
        if self.steps_done > 0:
            seconds = self.config.engine.update_seconds
            await update_weights(self.trainer, [process], self.steps_done, seconds)
            await self._make_room()

    async def check_log_probs(self) -> dict[str, float] | None:
        """How far trainer and engines are apart before anything is learned; None where it is not asked for."""
        if not self.config.log_prob_check.enabled:
            return None
        with self.clock.phase("check log-probs", announce=True):
            decode = self.inputs.tokenizer.decode
            found = await check_log_probs(
                self.config, self.inputs.train, decode, self.engines.engines, self.trainer
            )
            await self._make_room()
            return found

    async def evaluate(self, phase: str) -> float | None:
        """Held-out accuracy of the weights that the engines serve; None without held-out prompts.

        The sampling is keyed as step 0 each time: the same problems and seeds.
        """
        if not self.inputs.heldout:
            return None
        with self.clock.phase(phase, announce=True):
            trees = await self._sample(self.evaluation, self.inputs.heldout, step=0)
            self.failed_grades.check_and_clear(phase)
            return accuracy(trees)

    async def go_on(self, resume: Resume) -> None:
        """Become what the run was at the checkpoint: trainer, engines, order of prompts, counts."""
        state = resume.state
        with self.clock.phase(f"go on from {resume.checkpoint.name}", announce=True):
            await self.trainer.load(resume.checkpoint.resolve())
            async with self.engines.weights:
                await self._sync_weights(version=state.step)
                await self._make_room()
                self.steps_done = state.step
        self.clock.add(state.seconds, state.phase_seconds)
        self.order.cursor = state.cursor
        self.accuracy_before = state.accuracy_before
        self.decoded_tokens, self.sequential_tokens = state.decoded_tokens, state.sequential_tokens
        self.max_difference = state.max_difference

    async def _sync_weights(self, version: int) -> None:
        await sync_weights(self.trainer, self.engines, version, self.config.engine.update_seconds)

    async def _make_room(self) -> None:
        """Where the engines use the trainer's devices, memory that its allocator keeps is theirs to have."""
        if self.engines.shares_device:
            await self.trainer.release_cache()

    async def begin_checkpoint(self) -> None:
        """Of the step that is done; it is written while the next one is sampled."""
        with self.clock.phase("write checkpoint"):
            state = RunState(
                step=self.steps_done,
                cursor=self.order.cursor,
                data=self.inputs.train.report.fingerprint,
                sizes=self.folder.sizes(),
                accuracy_before=self.accuracy_before,
                decoded_tokens=self.decoded_tokens,
                sequential_tokens=self.sequential_tokens,
                max_difference=self.max_difference,
                seconds=self.clock.total(),
                phase_seconds=self.clock.seconds,
            )
            await self.checkpoints.begin(state)

    async def finish_checkpoint(self) -> None:
        with self.clock.phase("write checkpoint"):
            await self.checkpoints.finish()

    async def step(self, step: int) -> dict[str, float]:
        """Sample, grade, learn, update; returns the step's numbers."""
        seconds_before = dict(self.clock.seconds)
        with self.clock.phase("sample"):
            sampled, batch, dropped = await self._sample_batch(step)
        stats = self.training.take_stats()
        await self.finish_checkpoint()
        async with self.engines.resting():
            with self.clock.phase("score"):
                mini_batches = [await self._score(packs) for packs in self._pack(batch)]
                mismatch = log_prob_mismatch(replica for packs in mini_batches for replica in packs)
            with self.clock.phase("train"):
                updates = [await self._update(packs) for packs in self._with_grades(mini_batches)]
            with self.clock.phase("update"):
                await self._make_room()
                await self.engines.restore_memory("weights")
                await self._sync_weights(version=step)
                await self._make_room()
            self.steps_done = step
        self.decoded_tokens += stats.decoded_tokens
        self.sequential_tokens += stats.total_tokens
        self.max_difference = max(self.max_difference, mismatch["logprob_difference_max"])
        seconds = {name: total - seconds_before.get(name, 0.0) for name, total in self.clock.seconds.items()}
        return (
            tree_metrics(sampled)
            | _rollout_metrics(stats, seconds["sample"])
            | {f"dropped/{reason}": count for reason, count in dropped.items()}
            | mismatch
            | {"train/optimizer_steps": len(updates)}
            | _mean(updates)
            | {f"seconds/{name}": seconds[name] for name in ("sample", "score", "train", "update")}
        )

    async def _sample_batch(self, step: int) -> tuple[list[Tree], list[Tree], Mapping[Dropped, int]]:
        """All trees of the step, those to learn from (rewards shaped), and how many were dropped and why."""
        prompts, learning = self.config.data.prompts_per_step, self.config.learning
        if learning.dynamic_sampling:
            sampler = DynamicSampler(prompts, learning.max_refills)
            sampled: list[Tree] = []
            used: set[int] = set()
            while missing := sampler.missing():
                # Where an epoch ends between two rounds, the next may begin with a prompt of this step.
                fresh = [index for index in self.order.next(missing) if index not in used]
                used.update(fresh)
                round_trees = await self._sample_and_write(fresh, step) if fresh else []
                sampler.offer(round_trees)
                sampled += round_trees
            batch, dropped = sampler.batch, sampler.dropped
        else:
            batch = sampled = await self._sample_and_write(self.order.next(prompts), step)
            dropped = {}
        self.failed_grades.check_and_clear(f"step {step}")
        return sampled, [shaped(tree) for tree in batch], dropped

    async def _sample_and_write(self, indices: Sequence[int], step: int) -> list[Tree]:
        """Graded trees of the prompts at `indices` of the training data."""
        prompts = self.inputs.train.take(indices)
        trees = await self._sample(self.training, prompts, step)
        answers = {prompt.id: prompt.answer for prompt in prompts}
        for tree in trees:
            self.folder.write_tree(tree, step, answers[tree.prompt_id])
        return trees

    async def _sample(self, driver: TreeDriver, prompts: Sequence[Prompt], step: int) -> list[Tree]:
        """Graded trees in the order of `prompts`; a tree is graded as soon as it is finished."""
        by_id = {prompt.id: prompt for prompt in prompts}
        grading: dict[str, asyncio.Task[Tree]] = {}
        failures: list[FailedTree] = []
        async with (
            asyncio.TaskGroup() as group,
            watched(driver, self.engines.engines, self.config.engine.stall_seconds),
            aclosing(driver.sample(prompts, step)) as results,
        ):
            async for result in results:
                if isinstance(result, FailedTree):
                    failures.append(result)
                else:
                    grade = self._grade(result, by_id[result.prompt_id])
                    grading[result.prompt_id] = group.create_task(grade)
        if not grading:
            raise EngineError(f"step {step}: no tree could be sampled; the last: {failures[-1].reason}")
        return [grading[prompt.id].result() for prompt in prompts if prompt.id in grading]

    async def _grade(self, tree: Tree, prompt: Prompt) -> Tree:
        responses = [self.inputs.tokenizer.decode(tree.response(leaf)) for leaf in tree.leaves]
        grades = await self.rewards.grade(
            [GradeItem(response, prompt.answer, prompt.text, prompt.extra) for response in responses]
        )
        self.failed_grades.add(grades)
        limit = self.config.sampling.max_response_tokens
        return with_grades(tree, responses, grades, self.config.reward, limit)

    def _pack(self, trees: Sequence[Tree]) -> list[list[list[Pack]]]:
        """For each mini-batch, each replica's packs. Advantages are those of the whole batch."""
        learning, trainer = self.config.learning, self.config.trainer
        pack = pack_trees if learning.packing == "tree" else pack_flat
        return [
            pack(part, advantages, trainer.max_tokens_per_pack, trainer.parallel.data)
            for part, advantages in split_mini_batches(
                trees, estimate(trees, learning), learning.mini_batches
            )
        ]

    async def _score(self, packs: list[list[Pack]]) -> list[list[Pack]]:
        """The packs with the trainer's log-probs before any update, and the reference's where KL needs them."""
        temperature = self.config.sampling.temperature
        packs = attach(packs, "old_log_prob", await self.trainer.log_probs(packs, temperature))
        if self.config.learning.kl_coefficient:
            reference = await self.trainer.reference_log_probs(packs, temperature)
            packs = attach(packs, "reference_log_prob", reference)
        return packs

    def _with_grades(self, mini_batches: Sequence[list[list[Pack]]]) -> list[list[list[Pack]]]:
        """Those in which some response could be graded: the others have nothing to learn from."""
        graded = [packs for packs in mini_batches if denominator(packs, self.config.learning) > 0]
        if mini_batches and not graded:
            raise RewardError(
                "no response of this step could be graded (reward.deadline_seconds, reward.memory_mb)"
            )
        return graded

    async def _update(self, packs: list[list[Pack]]) -> dict[str, float]:
        """One optimizer step."""
        total = denominator(packs, self.config.learning)
        return await self.trainer.train_step(packs, self.config.sampling.temperature, total)


def _rollout_metrics(stats: Stats, seconds: float) -> dict[str, float]:
    return {
        "rollout/decoded_tokens": stats.decoded_tokens,
        "rollout/tokens_per_second": stats.decoded_tokens / seconds,
        "rollout/cached_token_ratio": stats.cached_token_ratio,
        "rollout/requests": stats.requests,
        "rollout/failed_requests": stats.failed_requests,
        "rollout/failed_trees": stats.failed_trees,
        "rollout/branchings": stats.branchings,
        "rollout/fallbacks": stats.fallbacks,
    }


def _mean(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The optimizer steps' metrics, averaged; nothing where no step was taken."""
    names = updates[0] if updates else ()
    return {f"train/{name}": sum(update[name] for update in updates) / len(updates) for name in names}
