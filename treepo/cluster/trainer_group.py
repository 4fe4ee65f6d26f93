"""The Megatron-Core trainer: one Ray actor for each rank. Every call is made on all ranks.

If a rank dies or hangs, the group ends all others too, because they wait for it: then it is lost, and every
call raises LostTrainerError until `restart`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from treepo.cluster.actor_death import death_of, memory_kills
from treepo.cluster.ray_actor import UNRECORDED, own_error
from treepo.cluster.reservation import reserve_again
from treepo.cluster.trainer_end import end_processes
from treepo.cluster.trainer_health import hang_of
from treepo.cluster.trainer_rank import CONCURRENCY, Beat, Method, RankProcess, TrainerRank
from treepo.config.run import RunConfig
from treepo.errors import LostTrainerError, PlacementError, TrainerError, TrainerMemoryError
from treepo.learning.packing import Pack
from treepo.protocols import BatchResult, MiniBatch
from treepo.watchdog import gathered
from treepo.weight_sync.lanes import lanes_of, on_one_host
from treepo.weight_sync.send import Outcome, WeightSink
from treepo.weight_sync.wire import Manifest

_DEATH_SECONDS = 2.0  # from the first failure until every rank that died is known to be dead
_PATIENCE = 1800.0  # for work on folders, the first compilation included: the collectives' own deadline
_PATIENT = frozenset({"build", "warm_up", "save", "finish_save", "load", "export"})

type Call = Callable[[int, Any], Any]
"""Starts a call on a rank, given its number and its actor."""


class TrainerGroup:
    """All trainer ranks: `treepo.protocols.Trainer`, and the weight sender of the engine pool.

    Construction returns at once; `ready` builds the model and warms it up. Ranks are numbered in Megatron's
    order: tensor parallel fastest, then context, data, pipeline. options: Ray's options for each rank's
    actor. nodes: Ray's id of each rank's node, if its resources are reserved.
    """

    def __init__(
        self, config: RunConfig, options: Sequence[dict[str, Any]], nodes: Sequence[str] = ()
    ) -> None:
        self._config, self._parallel = config, config.trainer.parallel
        self._manifest: Manifest = ()
        self._options, self._nodes = list(options), list(nodes)
        self._lost: LostTrainerError | None = None
        self._losing = asyncio.Lock()
        self._launch()

    @property
    def dtype(self) -> str:
        """Data type of the model's parameters."""
        return self._config.model.dtype

    async def ready(self) -> None:
        """Build the model on all ranks, and compute once, so that nothing is compiled and no communicator
        opened while others wait.

        Raises ConfigError or ModelError, and TrainerError if a full pack does not fit on the device.
        """
        world_size = len(self._ranks)
        self._processes = await self._all("build", lambda _, actor: actor.process.remote())
        host, port = (await self._all("build", lambda _, actor: actor.open_store.remote(), ranks=1))[0]
        await self._all(
            "build",
            lambda rank, actor: actor.build.remote(self._config, rank, world_size, host, port),
        )
        weights = self._config.weights
        await self._call("warm_up", lanes_of(weights), on_one_host(weights))

    async def restart(self) -> None:
        """Replace the lost ranks by new ones that are ready and have the model folder's weights. Ranks whose
        node has left the cluster get resources on another one.

        Raises what `ready` raises, and TrainerError if the resources are not free within
        `engine.start_seconds`.
        """
        await self._end()
        seconds = self._config.engine.start_seconds
        try:
            self._options, self._nodes = await reserve_again(self._options, self._nodes, seconds)
        except PlacementError as error:
            raise TrainerError(f"the trainer cannot start again: {error}") from None
        self._lost = None
        self._launch()
        await self.ready()

    async def devices(self) -> list[str]:
        """The GPU of every rank, as Ray numbers the GPUs of its node."""
        return await self._all("device", lambda _, actor: actor.device.remote())

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        """Compute each token's log-prob given its path, for every replica's packs: float32 [T]."""
        return await self._log_probs("log_probs", packs, temperature)

    async def reference_log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        """As `log_probs`, under the weights that training began with."""
        return await self._log_probs("reference_log_probs", packs, temperature)

    async def _log_probs(
        self,
        method: Literal["log_probs", "reference_log_probs"],
        packs: Sequence[Sequence[Pack]],
        temperature: float,
    ) -> list[list[np.ndarray]]:
        results = await self._call_by_replica(method, packs, temperature)
        firsts = range(0, self._parallel.stage_ranks, self._parallel.replica_ranks)
        return [results[first] for first in firsts]

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        """Take one optimizer step for each mini-batch. The packs are sent to their replica's ranks once."""
        shares = [
            [(mini_batch.packs[replica], mini_batch.denominator) for mini_batch in mini_batches]
            for replica in range(self._parallel.data)
        ]
        return (await self._call_by_replica("train_batch", shares, temperature))[0]

    async def manifest(self) -> Manifest:
        """List all tensors of the model, in the order in which they are sent; it never changes."""
        if not self._manifest:
            self._manifest = (await self._call("manifest"))[0]
        return self._manifest

    async def send_weights(self, version: int, sinks: Sequence[WeightSink]) -> Outcome:
        """Send every tensor to every engine; all of them have begun an update to `version`."""
        outcomes = await self._all("send_weights", lambda _, actor: actor.send_weights.remote(version, sinks))
        return outcomes[0]

    async def offload(self, weights: bool) -> None:
        """Give the devices to engines that share them, as `trainer.offload` says. weights: whether that may
        include the weights, which `send_weights` reads faster where they are.
        """
        await self._call("offload", weights)

    async def reload(self) -> None:
        """Take the devices back, before anything is computed."""
        await self._call("reload")

    async def release_cache(self) -> None:
        """Return unused device memory to the device, for the other processes on it."""
        await self._call("release_cache")

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face folder of the current weights. Raises CheckpointError or ModelError."""
        await self._call("export", folder)

    async def save(self, folder: Path, run: Mapping[str, Any], ready_trees: bytes) -> None:
        """Begin a training checkpoint that holds `run` and the ready trees too, which rank 0 writes. Raises
        CheckpointError.
        """
        await self._all(
            "save",
            lambda rank, actor: actor.call.remote("save", folder, run, ready_trees if rank == 0 else b""),
        )

    async def save_written(self) -> bool:
        """Whether every rank has written its part of the checkpoint that was begun, if any."""
        return all(await self._call("save_written"))

    async def finish_save(self) -> None:
        """Wait until the checkpoint that was begun is complete. Raises CheckpointError."""
        await self._call("finish_save")

    async def load(self, folder: Path) -> None:
        """Restore a training checkpoint of any layout. Raises ModelError."""
        await self._call("load", folder)

    async def _call(self, method: Method, *arguments: object) -> list[Any]:
        return await self._all(method, lambda _, actor: actor.call.remote(method, *arguments))

    async def _call_by_replica(
        self, method: Method, shares: Sequence[Sequence[object]], *arguments: object
    ) -> list[Any]:
        """Call with each replica's share as the first argument. Ray stores a share once for all ranks of the
        replica.
        """
        references = [ray.put(list(share)) for share in shares]
        return await self._all(
            method,
            lambda rank, actor: actor.call.remote(
                method, references[self._parallel.replica(rank)], *arguments
            ),
        )

    def _launch(self) -> None:
        actor: Any = ray.remote  # typed without concurrency groups
        remote = actor(concurrency_groups=CONCURRENCY)(TrainerRank)
        self._ranks: list[Any] = [
            remote.options(**UNRECORDED, **of_rank).remote() for of_rank in self._options
        ]
        self._processes: list[RankProcess] = []
        self._beats: list[Beat | None] = [None] * len(self._ranks)

    async def _all(self, what: str, start: Call, ranks: int | None = None) -> list[Any]:
        """Make a call on every rank, or on the first few; collect the results in the order of ranks.

        Raises LostTrainerError if a rank dies or hangs, and a rank's own TreepoError without Ray's traceback.
        """
        if self._lost is not None:
            async with self._losing:  # until its processes are gone
                raise LostTrainerError(str(self._lost))
        actors = self._ranks[:ranks]
        self._beats[:] = [None] * len(self._ranks)  # only what they say during this call explains its end
        calls = [start(rank, actor) for rank, actor in enumerate(actors)]
        answers = asyncio.ensure_future(gathered(f"the trainer ({what})", "rank", calls))
        hang = asyncio.ensure_future(self._hang(what, actors))
        try:
            await asyncio.wait((answers, hang), return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            raise await self._lose(f"the trainer hangs in {what}: {hang.result()}")
        except (RayActorError, RayTaskError) as error:
            raise await self._cause(error, calls) from None
        finally:
            answers.cancel()
            hang.cancel()
            await asyncio.gather(answers, hang, return_exceptions=True)

    async def _hang(self, what: str, actors: Sequence[Any]) -> str:
        """Return once ranks hang, with their names."""
        engine, silence = self._config.engine, self._config.trainer.silence_seconds
        patience = max(silence, _PATIENCE) if what in _PATIENT else silence
        if what == "send_weights":  # waits for each step of the slowest engine
            patience += engine.update_seconds
        if what == "build":  # the process starts, and imports
            silence = max(silence, engine.start_seconds)
        return await hang_of([actor.beat.remote for actor in actors], self._beats, silence, patience)

    async def _cause(self, error: RayActorError | RayTaskError, calls: Sequence[Any]) -> BaseException:
        """Our own error in place of Ray's. If the group is lost, its ranks have ended then."""
        own = own_error(error, LostTrainerError)
        deaths = await self._deaths(calls)
        if not deaths and not isinstance(own, LostTrainerError):
            return own
        if not deaths:
            return await self._lose(f"the trainer lost {own}")
        first = min(deaths)
        reason = await death_of(deaths[first])
        names = [f"rank {rank}" for rank in sorted(deaths)]
        names[0] += f" ({reason})"
        lost = await self._lose(f"the trainer lost {', '.join(names)}")
        short = self._killed_for_memory(first, deaths[first], reason)
        return TrainerMemoryError(f"{lost}; {short}") if short else lost

    def _killed_for_memory(self, rank: int, error: RayActorError, reason: str) -> str:
        """What a rank held when Ray or the kernel killed it for memory, and what takes less; else empty."""
        beat = self._beats[rank]
        by_kernel = beat is not None and memory_kills(reason) > beat.memory_kills
        if not by_kernel and "NODE_OUT_OF_MEMORY" not in str(error):
            return ""
        held = ""
        if beat is not None:
            held = f"it held {beat.resident / 2**30:.1f} of its machine's {beat.total / 2**30:.1f} GiB; "
        offload, workers = self._config.trainer.offload, self._config.reward.workers
        return (
            f"its machine is out of memory: {held}fewer reward.workers (now {workers}), trainer.offload = "
            f"none (now {offload}), checkpoint.every = null (a checkpoint is copied before it is written) or "
            "fewer ranks and engines on that machine take less"
        )

    async def _lose(self, reason: str) -> LostTrainerError:
        """End every rank; from now on every call raises the error that this returns."""
        async with self._losing:
            if self._lost is None:
                self._lost = LostTrainerError(reason)
                await self._end()
            return LostTrainerError(str(self._lost))

    async def _end(self) -> None:
        """End every rank, and return when their processes are gone."""
        for actor in self._ranks:
            ray.kill(actor)
        await end_processes(self._processes)

    async def _deaths(self, calls: Sequence[Any]) -> dict[int, RayActorError]:
        """The ranks that died, with Ray's reasons. Ranks that waited for them fail too, in the collective,
        and are not named.
        """
        if self._lost is not None:  # the others were ended
            return {}
        answers = [asyncio.ensure_future(call) for call in calls]
        await asyncio.wait(answers, timeout=_DEATH_SECONDS)
        outcomes = [answer.exception() if answer.done() else None for answer in answers]
        for answer in answers:
            answer.cancel()
        return {rank: error for rank, error in enumerate(outcomes) if isinstance(error, RayActorError)}
