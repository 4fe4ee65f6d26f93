"""Whether a run fits: devices in training, sampling and weight sync, host memory of nodes, placement.

Trainer and engines that share devices take turns. The trainer frees what only its computation needs, and
offloads what `trainer.offload` says, before the engines take their KV cache. The engines keep only their
runtime while the trainer computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo.config.run import RunConfig
from treepo.planning.hardware import GIB, Device, device
from treepo.planning.memory.engine import EngineMemory, engine_memory
from treepo.planning.memory.host import node_memory
from treepo.planning.memory.parts import Memory
from treepo.planning.memory.trainer import kept_while_sampling, packs_of_step, trainer_memory
from treepo.planning.nodes import Footprint, footprint, shares_devices, transport_problem

RUNTIME = 2 * GIB
"""CUDA's context, libraries and NCCL's buffers of one process on a GPU, estimated."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Bytes that a process or node needs and has. remedies: the configuration keys that change the need."""

    what: str
    need: float
    have: float
    remedies: str

    @property
    def holds(self) -> bool:
        return self.need <= self.have

    @property
    def fullness(self) -> float:
        return self.need / self.have

    def __str__(self) -> str:
        return f"{self.what}, {self.need / GIB:.1f} of {self.have / GIB:.1f} GiB"

    def violation(self) -> str:
        return (
            f"{self.what}: needs {self.need / GIB:.1f} GiB, and there are {self.have / GIB:.1f} GiB; "
            f"it depends on {self.remedies}"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout's devices and nodes, and what each process holds.

    trainer: one rank of each pipeline stage in a training step, then rank 0 in a weight sync. host: the
    fullest node. problem: the constraint that is violated most; None if all hold.
    """

    device: Device
    footprint: Footprint
    trainer: tuple[Memory, ...]
    engine: EngineMemory
    host: Memory
    limits: tuple[Limit, ...]
    problem: str | None

    @property
    def fullest(self) -> Limit:
        """The limit nearest to being reached, or violated most."""
        return max(self.limits, key=lambda limit: limit.fullness)


def fit(config: RunConfig, folder: Path) -> Fit:
    """Raises ConfigError if the layout does not divide the model in `folder`."""
    hardware, occupied, shared = device(config.plan.device), footprint(config), shares_devices(config)
    on_gpus = hardware.name != "cpu"
    trainer = trainer_memory(config, folder, shared)
    runtime = RUNTIME if on_gpus else 0
    staying = kept_while_sampling(config)
    kept = max(stage.subtotal(staying) for stage in trainer[:-1]) + runtime if shared else 0
    engine = engine_memory(config, folder, hardware.memory - runtime - kept)
    host = node_memory(config, folder, trainer[:-1], engine)
    if on_gpus:
        packs = packs_of_step(config, folder, engine.expected_tree)
        trainer = _with_runtime(trainer, engine, packs, shared)
        limits = _gpu_limits(config, hardware, trainer, host)
    else:
        limits = _cpu_limits(config, hardware, trainer, engine, host)
    worst = max(
        (limit for limit in limits if not limit.holds), key=lambda limit: limit.fullness, default=None
    )
    return Fit(
        hardware,
        occupied,
        tuple(trainer),
        engine,
        host,
        tuple(limits),
        occupied.problem
        or (worst and worst.violation())
        or engine.problem
        or transport_problem(config, occupied),
    )


def _with_runtime(
    trainer: Sequence[Memory], engine: EngineMemory, packs: float, shared: bool
) -> list[Memory]:
    """Adds what a GPU holds beside the tensors of the trainer's largest micro-batches.

    The engines reload their weights before a sync, and their KV cache after it. packs: bytes of a step's.
    """
    runtime: dict[str, tuple[float, str]] = {"CUDA and NCCL": (RUNTIME, "")}
    reloaded: dict[str, tuple[float, str]] = {}
    if shared:
        runtime["engine's CUDA and NCCL"] = RUNTIME, ""
        runtime["engine's CUDA graphs"] = engine.graphs, ""
        if "adapter" in engine.memory.parts:  # SGLang's memory saver leaves it
            runtime["engine's adapter"] = engine.memory.parts["adapter"], ""
        reloaded["engine's weights"] = engine.memory.parts["weights"], ""
    *stages, syncing = trainer
    waiting = [max(0.0, packs - stage.parts["tree packs"]) for stage in stages]
    return [
        *(
            stage.plus({"other tree packs": (size, "the step's others"), **runtime})
            for stage, size in zip(stages, waiting, strict=True)
        ),
        syncing.plus(runtime | reloaded),
    ]


def _gpu_limits(config: RunConfig, hardware: Device, trainer: Sequence[Memory], host: Memory) -> list[Limit]:
    """The engine takes what is left, so it has no limit of its own."""
    *stages, syncing = trainer
    remedies = "trainer.parallel, trainer.recompute, trainer.max_tokens_per_pack"
    node = config.plan.node_memory_gib * GIB
    return [
        *(Limit(stage.owner, stage.total, hardware.memory, remedies) for stage in stages),
        Limit(syncing.owner, syncing.total, hardware.memory, "trainer.parallel, engine.tensor"),
        Limit(host.owner, host.total, node, "plan.node_memory_gib, checkpoint.every, engine.tensor"),
    ]


def _cpu_limits(
    config: RunConfig, hardware: Device, trainer: Sequence[Memory], engine: EngineMemory, host: Memory
) -> list[Limit]:
    """All processes share the memory. They take turns, but a CPU's allocator returns little meanwhile."""
    parallel, engines = config.trainer.parallel, config.engine
    need = parallel.stage_ranks * sum(memory.total for memory in trainer[:-1])
    need += engines.count * engines.ranks * engine.memory.subtotal(("weights", "KV cache"))
    remedies = "trainer.max_tokens_per_pack, engine.max_total_tokens, trainer.parallel, engine.count"
    return [Limit("all processes together", need + host.total, hardware.memory, remedies)]
