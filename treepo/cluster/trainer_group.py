"""The Megatron-Core actor as Ray actors: one process a rank, every call made on all of them at once."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.cluster.ray_actor import own_error, use_interface_of_node
from treepo.cluster.reservation import unreserved_ranks
from treepo.config.run import RunConfig
from treepo.errors import TrainerError
from treepo.learning.packing import Pack
from treepo.weight_sync.send import Outcome, WeightSink, WeightStream, open_sender
from treepo.weight_sync.wire import Manifest

_DEATH_SECONDS = 2.0  # from the first failure to the moment at which we know who died


class TrainerRank:
    """One rank in its own process. Rank 0 opens the store at which the others meet.

    Megatron-Core is imported by the ranks only: the driver starts seconds sooner without it. Ranks end with
    their processes, which are Ray's to end.
    """

    def device(self) -> str:
        """What Ray calls this rank's GPU on its node."""
        (device,) = ray.get_gpu_ids()
        return str(device)

    def open_store(self) -> tuple[str, int]:
        """Host and port of the rendezvous, on a port that was free."""
        from megatron_bridge.trainer import create_store

        host = ray.util.get_node_ip_address()
        self._store = create_store(host)
        return host, self._store.port

    def build(self, config: RunConfig, rank: int, world_size: int, host: str, port: int) -> None:
        """Load the model. Collective, like every method below."""
        from megatron_bridge.trainer import MegatronTrainer

        use_interface_of_node()
        self._config, self._rank = config, rank
        self._stream: WeightStream | None = None
        if rank > 0:
            self._store = TCPStore(host, port, is_master=False)
        self._trainer = MegatronTrainer(
            config.model.path.resolve(),
            config.model.dtype,
            config.trainer,
            config.learning,
            rank=rank,
            world_size=world_size,
            store=self._store,
        )

    def log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        return self._trainer.log_probs(packs, temperature)

    def reference_log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        return self._trainer.reference_log_probs(packs, temperature)

    def train_step(self, packs: Sequence[Pack], temperature: float, denominator: float) -> dict[str, float]:
        return self._trainer.train_step(packs, temperature, denominator)

    def manifest(self) -> Manifest:
        return self._trainer.manifest()

    def send_weights(self, version: int, sinks: Sequence[WeightSink]) -> Outcome | None:
        """Stream the weights to the engines from rank 0; the others take part in gathering only."""
        if self._rank > 0:
            for _ in self._trainer.tensors():
                pass
            return None
        if self._stream is None:
            weights, seconds = self._config.weights, self._config.engine.update_seconds
            sender = open_sender(weights, self._config.out, ray.util.get_node_ip_address(), seconds)
            self._stream = WeightStream(sender, weights.bucket_mb << 20, seconds)
        return self._stream.send(self._trainer.tensors(), self._trainer.manifest(), version, sinks)

    def release_cache(self) -> None:
        self._trainer.release_cache()

    def export(self, folder: Path) -> None:
        self._trainer.export(folder)

    def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._trainer.save(folder, run)

    def finish_save(self) -> None:
        self._trainer.finish_save()

    def load(self, folder: Path) -> None:
        self._trainer.load(folder)


class TrainerGroup:
    """All trainer ranks. Construction returns at once; `ready` builds the model on them.

    Ranks are numbered by Megatron's order: tensor parallel fastest, then data, then pipeline; packs go to
    a rank by its data-parallel index. seats: Ray's options for each rank's actor; None where nothing was
    reserved.
    """

    def __init__(self, config: RunConfig, seats: Sequence[dict[str, Any]] | None = None) -> None:
        parallel = config.trainer.parallel
        self._config = config
        self._tensor, self._replicas = parallel.tensor, parallel.data
        seats = unreserved_ranks(parallel) if seats is None else seats
        remote: Any = ray.remote(TrainerRank)
        self._ranks: list[Any] = [remote.options(**seat).remote() for seat in seats]

    async def ready(self) -> None:
        world_size = len(self._ranks)
        host, port = await self._ranks[0].open_store.remote()
        await asyncio.gather(
            *(
                actor.build.remote(self._config, rank, world_size, host, port)
                for rank, actor in enumerate(self._ranks)
            )
        )

    async def devices(self) -> list[str]:
        """The GPU of every rank, as Ray numbers those of its node."""
        return await self._call("device")

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        """For every replica's packs: float32 [T], each token's log-prob given its path."""
        return await self._score("log_probs", packs, temperature)

    async def reference_log_probs(
        self, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        """The same under the weights that training began with."""
        return await self._score("reference_log_probs", packs, temperature)

    async def train_step(
        self, packs: Sequence[Sequence[Pack]], temperature: float, denominator: float
    ) -> dict[str, float]:
        """One optimizer step; `denominator` divides the loss that is summed over all replicas' packs."""
        return (await self._call_by_replica("train_step", packs, temperature, denominator))[0]

    async def manifest(self) -> Manifest:
        """All tensors of the model, as they are sent."""
        return await self._ranks[0].manifest.remote()

    async def send_weights(self, version: int, sinks: Sequence[WeightSink]) -> Outcome:
        """Every tensor to every engine, all of which have begun an update to `version`."""
        return (await self._call("send_weights", version, sinks))[0]

    async def release_cache(self) -> None:
        """Device memory that holds nothing any more is free for other processes."""
        await self._call("release_cache")

    async def export(self, folder: Path) -> None:
        """A Hugging Face folder of the current weights. Raises CheckpointError, ModelError."""
        await self._call("export", folder)

    async def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Begin a training checkpoint with the run's own `run` in it. Raises CheckpointError."""
        await self._call("save", folder, run)

    async def finish_save(self) -> None:
        """The checkpoint that was begun is there. Raises CheckpointError."""
        await self._call("finish_save")

    async def load(self, folder: Path) -> None:
        """Go on from a training checkpoint, of any layout. Raises ModelError."""
        await self._call("load", folder)

    async def _score(
        self, method: str, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        results = await self._call_by_replica(method, packs, temperature)
        return [results[replica * self._tensor] for replica in range(self._replicas)]

    async def _call(self, method: str, *arguments: object) -> list[Any]:
        return await self._gather([getattr(rank, method).remote(*arguments) for rank in self._ranks])

    async def _gather(self, calls: Sequence[Any]) -> list[Any]:
        """The results of a collective call in the order of ranks. Raises TrainerError where a rank dies, and
        a rank's TreepoError as what it is: Ray's own would show where it was raised.
        """
        try:
            return await asyncio.gather(*calls)
        except (RayActorError, RayTaskError) as error:
            gone = await self._gone(calls)
            if gone:
                raise TrainerError(f"the trainer lost {', '.join(gone)}") from error
            raise own_error(error, TrainerError) from None

    async def _gone(self, calls: Sequence[Any]) -> list[str]:
        """Which ranks died: those that waited for them only fail in the collective."""
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_DEATH_SECONDS, fetch_local=False)
        outcomes = await asyncio.gather(*ended, return_exceptions=True)
        return [
            f"rank {calls.index(call)}"
            for call, outcome in zip(ended, outcomes, strict=True)
            if isinstance(outcome, RayActorError)
        ]

    async def _call_by_replica(
        self, method: str, packs: Sequence[Sequence[Pack]], *arguments: object
    ) -> list[Any]:
        references = [ray.put(list(of_replica)) for of_replica in packs]
        return await self._gather(
            [
                getattr(actor, method).remote(references[rank // self._tensor % self._replicas], *arguments)
                for rank, actor in enumerate(self._ranks)
            ]
        )
