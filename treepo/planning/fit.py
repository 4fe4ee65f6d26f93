"""Whether a run fits: every device while it trains, samples and updates, every node's memory, the places.

Where trainer and engines share devices they take turns: what the trainer needs only while it computes is
given back before the engines take their cache, and the engines keep only their runtime while it computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo.config.run import RunConfig
from treepo.planning.engine import EngineMemory, engine_memory
from treepo.planning.hardware import GIB, Device, device
from treepo.planning.host import node_memory
from treepo.planning.memory import Memory
from treepo.planning.places import Places, places
from treepo.planning.trainer import trainer_memory
from treepo.planning.update_problem import update_problem

STATE = ("weights", "gradients", "optimizer")
"""What the trainer holds all the time."""
RUNTIME = 2 * GIB
"""Of a GPU's memory, for each process on it: CUDA's context, libraries, NCCL's buffers. An estimate."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Bytes that must not be more than there are. remedies: keys of the configuration that change them."""

    what: str
    need: float
    have: float
    remedies: str

    @property
    def holds(self) -> bool:
        return self.need <= self.have

    def __str__(self) -> str:
        return f"{self.what}, {self.need / GIB:.1f} of {self.have / GIB:.1f} GiB"

    def broken(self) -> str:
        """What to say where it does not hold."""
        return (
            f"{self.what}: needs {self.need / GIB:.1f} GiB, and there are {self.have / GIB:.1f} GiB; "
            f"it follows from {self.remedies}"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout's places, and what each holds.

    trainer: one rank of each pipeline stage in a training step, and rank 0 in a weight update. host: the
    fullest node's. problem: the constraint that is furthest from being kept; None where all are.
    """

    device: Device
    places: Places
    trainer: tuple[Memory, ...]
    engine: EngineMemory
    host: Memory
    limits: tuple[Limit, ...]
    problem: str | None

    @property
    def fullest(self) -> Limit:
        """The limit that is nearest to being reached, or furthest beyond."""
        return max(self.limits, key=lambda limit: limit.need / limit.have)


def fit(config: RunConfig, folder: Path) -> Fit:
    """Raises ConfigError where the layout does not divide the model of `folder`."""
    hardware, where = device(config.plan.device), places(config)
    on_gpus = hardware.name != "cpu"
    shared = config.placement == "colocated" and on_gpus
    trainer = trainer_memory(config, folder)
    runtime = RUNTIME if on_gpus else 0
    kept = max(memory.held(STATE) for memory in trainer) + runtime if shared else 0
    engine = engine_memory(config, folder, hardware.memory - runtime - kept)
    if on_gpus:
        trainer = _with_runtime(trainer, engine, shared)
    host = node_memory(config, folder, engine)
    if on_gpus:
        limits = _on_gpus(config, hardware, trainer, host)
    else:
        limits = _on_this_machine(config, hardware, trainer, engine, host)
    broken = [limit for limit in limits if not limit.holds]
    worst = max(broken, key=lambda limit: limit.need / limit.have, default=None)
    return Fit(
        hardware,
        where,
        tuple(trainer),
        engine,
        host,
        tuple(limits),
        where.problem or (worst and worst.broken()) or engine.problem or update_problem(config, where),
    )


def _with_runtime(trainer: Sequence[Memory], engine: EngineMemory, shared: bool) -> list[Memory]:
    """What a GPU holds beside the trainer's tensors. Before an update the engine's weights come back, the
    cache after it.
    """
    own = {"CUDA and NCCL": RUNTIME} | ({"engine's CUDA and NCCL": RUNTIME} if shared else {})
    back = {"engine's weights": engine.memory.parts["weights"]} if shared else {}
    *stages, updating = trainer
    return [*(stage.plus(own, {}) for stage in stages), updating.plus(own | back, {})]


def _on_gpus(config: RunConfig, hardware: Device, trainer: Sequence[Memory], host: Memory) -> list[Limit]:
    """The engine takes what is left."""
    *stages, updating = trainer
    remedies = "trainer.parallel, trainer.recompute, trainer.max_tokens_per_pack"
    node = config.plan.node_memory_gib * GIB
    return [
        *(Limit(stage.owner, stage.total, hardware.memory, remedies) for stage in stages),
        Limit(updating.owner, updating.total, hardware.memory, "trainer.parallel, engine.tensor"),
        Limit(host.owner, host.total, node, "plan.node_memory_gib, checkpoint.every, engine.tensor"),
    ]


def _on_this_machine(
    config: RunConfig,
    hardware: Device,
    trainer: Sequence[Memory],
    engine: EngineMemory,
    host: Memory,
) -> list[Limit]:
    """All processes share it. They take turns, but a CPU's allocator gives little back meanwhile."""
    parallel, engines = config.trainer.parallel, config.engine
    need = parallel.tensor * parallel.data * sum(memory.total for memory in trainer[:-1])
    need += (
        engines.count * engines.tensor * (engine.memory.parts["weights"] + engine.memory.parts["KV cache"])
    )
    remedies = "trainer.max_tokens_per_pack, engine.max_total_tokens, trainer.parallel, engine.count"
    return [Limit("all processes together", need + host.total, hardware.memory, remedies)]
