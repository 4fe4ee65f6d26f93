"""The Megatron-Core trainer as Ray actors: one process for each rank. Every call is made on all ranks."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from treepo.cluster.actor_death import death_of, note_start
from treepo.cluster.ray_actor import own_error, use_interface_of_node
from treepo.config.run import RunConfig
from treepo.errors import TrainerError
from treepo.learning.packing import Pack
from treepo.protocols import BatchResult, MiniBatch
from treepo.watchdog import gathered
from treepo.weight_sync.send import Outcome, WeightSink, WeightStream, open_sender
from treepo.weight_sync.wire import Manifest

_DEATH_SECONDS = 2.0  # from the first failure until every rank that died is known to be dead

Method = (
    Literal["warm_up", "log_probs", "train_batch", "offload", "reload", "release_cache", "manifest"]
    | Literal["save", "finish_save", "load", "export"]
)
"""The methods of `megatron_bridge.trainer.MegatronTrainer` that `TrainerRank.call` reaches."""


class TrainerRank:
    """One rank, in a process of its own. Rank 0 opens the store through which the ranks find each other.

    Only the ranks import Megatron-Core, which takes seconds. Ray ends the processes.
    """

    def device(self) -> str:
        """Return Ray's name of this rank's GPU on its node."""
        (device,) = ray.get_gpu_ids()
        return str(device)

    def open_store(self) -> tuple[str, int]:
        """Open the ranks' store on a free port; return its host and port."""
        from megatron_bridge.trainer import create_store

        host = ray.util.get_node_ip_address()
        self._store = create_store(host)
        return host, self._store.port

    def build(self, config: RunConfig, rank: int, world_size: int, host: str, port: int) -> None:
        """Load the model. Collective, like every method below."""
        from megatron_bridge.trainer import MegatronTrainer, join_store

        note_start()
        use_interface_of_node()
        self._config, self._rank = config, rank
        self._stream: WeightStream | None = None
        if rank > 0:
            self._store = join_store(host, port)
        self._trainer = MegatronTrainer(
            config.model.path.resolve(),
            config.model.dtype,
            config.trainer,
            config.learning,
            rank=rank,
            world_size=world_size,
            store=self._store,
        )

    def call(self, method: Method, *arguments: object) -> Any:
        """Call a method of the trainer; `TrainerGroup` has their types."""
        return getattr(self._trainer, method)(*arguments)

    def send_weights(self, version: int, manifest: Manifest, sinks: Sequence[WeightSink]) -> Outcome | None:
        """Send the weights to the engines from rank 0; the other ranks only send it their shards, and return
        None.
        """
        if self._rank > 0:
            for _ in self._trainer.tensors():
                pass
            return None
        if self._stream is None:
            weights, seconds = self._config.weights, self._config.engine.update_seconds
            sender = open_sender(weights, self._config.out, ray.util.get_node_ip_address(), seconds)
            self._stream = WeightStream(sender, weights.bucket_mb << 20, seconds)
        return self._stream.send(self._trainer.tensors(), manifest, version, sinks)


class TrainerGroup:
    """All trainer ranks: `treepo.protocols.Trainer`, and the weight sender of the engine pool.

    Construction returns at once; `ready` builds the model and warms it up. Ranks are numbered in Megatron's
    order: tensor parallel fastest, then data, then pipeline. options: Ray's options for each rank's actor.
    """

    def __init__(self, config: RunConfig, options: Sequence[dict[str, Any]]) -> None:
        parallel = config.trainer.parallel
        self._config = config
        self._tensor, self._replicas = parallel.tensor, parallel.data
        self._manifest: Manifest = ()
        remote: Any = ray.remote(TrainerRank)
        self._ranks: list[Any] = [remote.options(**of_rank).remote() for of_rank in options]

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
        host, port = await self._ranks[0].open_store.remote()
        await self._gather(
            [
                actor.build.remote(self._config, rank, world_size, host, port)
                for rank, actor in enumerate(self._ranks)
            ]
        )
        await self._call("warm_up")

    async def devices(self) -> list[str]:
        """The GPU of every rank, as Ray numbers the GPUs of its node."""
        return await self._gather([rank.device.remote() for rank in self._ranks])

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        """Compute each token's log-prob given its path, for every replica's packs: float32 [T]."""
        results = await self._call_by_replica("log_probs", packs, temperature)
        return [results[replica * self._tensor] for replica in range(self._replicas)]

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        """Take one optimizer step for each mini-batch. The packs are sent to their replica's ranks once."""
        shares = [
            [(mini_batch.packs[replica], mini_batch.denominator) for mini_batch in mini_batches]
            for replica in range(self._replicas)
        ]
        return (await self._call_by_replica("train_batch", shares, temperature))[0]

    async def manifest(self) -> Manifest:
        """List all tensors of the model, in the order in which they are sent; it never changes."""
        if not self._manifest:
            self._manifest = (await self._call("manifest"))[0]
        return self._manifest

    async def send_weights(self, version: int, sinks: Sequence[WeightSink]) -> Outcome:
        """Send every tensor to every engine; all of them have begun an update to `version`."""
        manifest = await self.manifest()
        return (
            await self._gather([rank.send_weights.remote(version, manifest, sinks) for rank in self._ranks])
        )[0]

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
        first, *others = self._ranks
        calls = [first.call.remote("save", folder, run, ready_trees)]
        await self._gather(calls + [rank.call.remote("save", folder, run) for rank in others])

    async def finish_save(self) -> None:
        """Wait until the checkpoint that was begun is complete. Raises CheckpointError."""
        await self._call("finish_save")

    async def load(self, folder: Path) -> None:
        """Restore a training checkpoint of any layout. Raises ModelError."""
        await self._call("load", folder)

    async def _call(self, method: Method, *arguments: object) -> list[Any]:
        return await self._gather([rank.call.remote(method, *arguments) for rank in self._ranks])

    async def _call_by_replica(
        self, method: Method, shares: Sequence[Sequence[object]], *arguments: object
    ) -> list[Any]:
        """Call with each replica's share as the first argument. Ray stores a share once for all ranks of the
        replica.
        """
        references = [ray.put(list(share)) for share in shares]
        return await self._gather(
            [
                actor.call.remote(method, references[rank // self._tensor % self._replicas], *arguments)
                for rank, actor in enumerate(self._ranks)
            ]
        )

    async def _gather(self, calls: Sequence[Any]) -> list[Any]:
        """Collect the results of a collective call in the order of ranks.

        Raises TrainerError if a rank dies, and a rank's own TreepoError without Ray's traceback.
        """
        try:
            return await gathered("the trainer", "rank", calls)
        except (RayActorError, RayTaskError) as error:
            gone = await self._gone(calls)
            if gone:
                raise TrainerError(f"the trainer lost {', '.join(gone)}") from error
            raise own_error(error, TrainerError) from None

    async def _gone(self, calls: Sequence[Any]) -> list[str]:
        """Name the ranks that died, with the reason of the first. Ranks that waited for them fail too, in the
        collective, and are not named.
        """
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_DEATH_SECONDS, fetch_local=False)
        outcomes = await asyncio.gather(*ended, return_exceptions=True)
        deaths = {
            calls.index(call): outcome
            for call, outcome in zip(ended, outcomes, strict=True)
            if isinstance(outcome, RayActorError)
        }
        names = [f"rank {rank}" for rank in sorted(deaths)]
        if names:
            names[0] += f" ({await death_of(deaths[min(deaths)])})"
        return names
