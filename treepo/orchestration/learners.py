"""The Megatron-Core actor as Ray actors: one process a rank, every call made on all of them at once."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.config.schema import RunConfig
from treepo.packing import Pack


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
        from megatron_bridge.actor import create_store

        host = ray.util.get_node_ip_address()
        self._store = create_store(host)
        return host, self._store.port

    def build(self, config: RunConfig, rank: int, world_size: int, host: str, port: int) -> None:
        """Load the model. Collective, like every method below."""
        from megatron_bridge.actor import MegatronActor

        if rank > 0:
            self._store = TCPStore(host, port, is_master=False)
        self._actor = MegatronActor(
            config.model.path.resolve(),
            config.model.dtype,
            config.actor,
            config.learning,
            rank=rank,
            world_size=world_size,
            store=self._store,
        )

    def log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        return self._actor.log_probs(packs, temperature)

    def reference_log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        return self._actor.reference_log_probs(packs, temperature)

    def train_step(self, packs: Sequence[Pack], temperature: float, denominator: float) -> dict[str, float]:
        return self._actor.train_step(packs, temperature, denominator)

    def send_weights(self, engines: Sequence[Any]) -> list[str]:
        """Stream the weights to every engine; the next bucket is gathered while the last one travels.

        Returns the names that were sent (on rank 0; the other ranks only take part in gathering).
        """
        names: list[str] = []
        travelling: list[Any] = []
        for bucket in self._actor.buckets():
            ray.get(travelling)
            names += bucket.names
            reference = ray.put(bucket)
            travelling = [engine.load.remote(reference) for engine in engines]
        ray.get(travelling)
        return names

    def export(self, folder: Path) -> None:
        self._actor.export(folder)


class LearnerGroup:
    """All trainer ranks. Construction returns at once; `ready` builds the model on them.

    Ranks are numbered by Megatron's order: tensor parallel fastest, then data, then pipeline; packs go to
    a rank by its data-parallel index. seats: Ray's options for each rank's actor.
    """

    def __init__(self, config: RunConfig, seats: Sequence[dict[str, Any]]) -> None:
        parallel = config.actor.parallel
        self._config = config
        self._tensor, self._replicas = parallel.tensor, parallel.data
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

    async def send_weights(self, engines: Sequence[Any]) -> list[str]:
        """Every tensor to every engine; returns the names sent."""
        return (await self._call("send_weights", engines))[0]

    async def export(self, folder: Path) -> None:
        """A Hugging Face folder of the current weights."""
        await self._call("export", folder)

    async def _score(
        self, method: str, packs: Sequence[Sequence[Pack]], temperature: float
    ) -> list[list[np.ndarray]]:
        results = await self._call_by_replica(method, packs, temperature)
        return [results[replica * self._tensor] for replica in range(self._replicas)]

    async def _call(self, method: str, *arguments: object) -> list[Any]:
        return await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self._ranks))

    async def _call_by_replica(
        self, method: str, packs: Sequence[Sequence[Pack]], *arguments: object
    ) -> list[Any]:
        references = [ray.put(list(of_replica)) for of_replica in packs]
        return await asyncio.gather(
            *(
                getattr(actor, method).remote(references[rank // self._tensor % self._replicas], *arguments)
                for rank, actor in enumerate(self._ranks)
            )
        )
