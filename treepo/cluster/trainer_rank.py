"""One rank of the trainer as a Ray actor, in a process of its own.

Its methods run one after another on one thread, because CUDA's current device belongs to the thread. Beside
it another thread answers `beat` and `process`, also while the rank computes or waits for the others.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import ray

from megatron_bridge import progress
from treepo.cluster.actor_death import kernel_kills, note_start
from treepo.cluster.ray_actor import use_interface_of_node
from treepo.config.run import RunConfig
from treepo.errors import LostTrainerError, TrainerMemoryError, one_line, shortened
from treepo.weight_sync.lanes import lane_bucket, lanes_of, on_one_host
from treepo.weight_sync.send import Outcome, WeightSink, WeightStream, open_sender

CONCURRENCY = {"beat": 1}
"""Ray's concurrency groups of the actor; without a group of their own, methods share one more thread."""

Method = (
    Literal["warm_up", "log_probs", "reference_log_probs", "train_batch", "offload", "reload"]
    | Literal["release_cache", "manifest"]
    | Literal["save", "save_written", "finish_save", "load", "export"]
)
"""The methods of `megatron_bridge.trainer.MegatronTrainer` that `TrainerRank.call` reaches."""


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A rank's process. node: Ray's id of its node. started: in seconds since 1970; tells it from a later
    process with the same id.
    """

    node: str
    pid: int
    started: float


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself at any time.

    finished: pieces of work since it began (`megatron_bridge.progress`). resident: bytes of host memory that
    its process has. total: of its machine. memory_kills: processes that the machine's kernel has killed for
    memory since the rank's start.
    """

    finished: int
    resident: int
    total: int
    memory_kills: int


class TrainerRank:
    """Rank 0 opens the store through which the ranks find each other.

    Only the ranks import Megatron-Core, which takes seconds. Ray ends the processes.
    """

    def __init__(self) -> None:
        note_start()
        self._kills_before = kernel_kills()

    @ray.method(concurrency_group="beat")
    def process(self) -> RankProcess:
        return RankProcess(
            ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time()
        )

    @ray.method(concurrency_group="beat")
    def beat(self) -> Beat:
        """Return at once, whatever the rank does."""
        return Beat(
            progress.finished(),
            psutil.Process().memory_info().rss,
            psutil.virtual_memory().total,
            kernel_kills() - self._kills_before,
        )

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
        """Load the model. Collective, like every method below; all raise LostTrainerError if a collective or
        the device fails, and TrainerMemoryError.
        """
        from megatron_bridge.trainer import MegatronTrainer, join_store

        use_interface_of_node()
        self._config, self._rank = config, rank
        self._stream: WeightStream | None = None
        with self._failures_named("the start"):
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
                sends_adapter=config.weights.send == "adapter",
            )

    def call(self, method: Method, *arguments: object) -> Any:
        """Call a method of the trainer; `TrainerGroup` has their types."""
        with self._failures_named(method):
            return getattr(self._trainer, method)(*arguments)

    def send_weights(self, version: int, sinks: Sequence[WeightSink]) -> Outcome | None:
        """Send this rank's share of the weights to the engines. A rank without a lane only gives its shards
        to the ranks that have one, and returns None. Rank 0's outcome counts.
        """
        with self._failures_named("send_weights"):
            weights, seconds = self._config.weights, self._config.engine.update_seconds
            source = self._trainer.weight_source(lanes_of(weights), on_one_host(weights))
            size = lane_bucket(weights, source.lanes, self._config.engine.ranks)
            if source.lane is None:
                for _ in source.rounds(size):
                    pass
                return None
            if self._stream is None:
                sender = open_sender(weights, self._config.out, ray.util.get_node_ip_address(), seconds)
                self._stream = WeightStream(sender, size, seconds)
            return self._stream.send(source, version, sinks)

    @contextmanager
    def _failures_named(self, what: str) -> Iterator[None]:
        """Translate failures of memory, device and collectives; every other error passes as it is."""
        import torch

        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(what, error) from None
        except RuntimeError as error:
            if "DefaultCPUAllocator" in str(error):
                raise self._out_of_memory(what, error) from None
            if isinstance(error, (torch.distributed.DistError, torch.AcceleratorError)) or _of_gloo(error):
                reason = shortened(one_line(error), 300)
                raise LostTrainerError(f"rank {self._rank} ({what}: {reason})") from None
            raise

    def _out_of_memory(self, what: str, error: BaseException) -> TrainerMemoryError:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return TrainerMemoryError(
            f"trainer rank {self._rank} ran out of memory in {what}: {said}; {less_memory(self._config)}"
        )


def less_memory(config: RunConfig) -> str:
    """Which keys take less of the memory in which a rank computes, with their present values."""
    trainer = config.trainer
    keys = [f"a lower trainer.max_tokens_per_pack (now {trainer.max_tokens_per_pack})"]
    if trainer.recompute != "full":
        keys.append(f"trainer.recompute = full (now {trainer.recompute})")
    keys.append(f"more ranks in trainer.parallel (now {trainer.parallel.ranks})")
    return f"{', '.join(keys[:-1])} or {keys[-1]} take less"


def _of_gloo(error: RuntimeError) -> bool:
    """Whether the error is gloo's, which has no type of its own."""
    return "/gloo/" in str(error)
