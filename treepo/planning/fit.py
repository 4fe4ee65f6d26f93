"""Whether a run fits: every device while it trains, samples and updates, every node's memory, the places.

Where trainer and engines share devices they take turns: what the trainer needs only while it computes is
given back before the engines take their cache, and the engines keep only their runtime while it computes.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from treepo.config.schema import RunConfig
from treepo.errors import PlacementError
from treepo.orchestration import placement
from treepo.orchestration.placement import Node, run_layout
from treepo.planning.engine import EngineMemory, engine_memory
from treepo.planning.hardware import GIB, Device, device
from treepo.planning.memory import Memory
from treepo.planning.trainer import trainer_memory

STATE = ("weights", "gradients", "optimizer")
"""What the trainer holds all the time."""
RUNTIME = 2 * GIB
"""Of a GPU's memory, for each process on it: CUDA's context, libraries, NCCL's buffers. Not measured here."""


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
        return (
            f"{self.what} need {self.need / GIB:.1f} GiB, and there are {self.have / GIB:.1f} GiB "
            f"({self.remedies})"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout's devices and what each holds. problem: the constraint that is furthest from being kept."""

    device: Device
    devices: int
    nodes: int
    shared: bool
    trainer: tuple[Memory, ...]
    engine: EngineMemory
    limits: tuple[Limit, ...]
    problem: str | None

    @property
    def fullest(self) -> Limit:
        """The limit that is nearest to being reached, or furthest beyond."""
        return max(self.limits, key=lambda limit: limit.need / limit.have)


def fit(config: RunConfig, folder: Path) -> Fit:
    """Raises ConfigError where the layout does not divide the model of `folder`."""
    hardware, layout = device(config.plan.device), run_layout(config)
    on_gpus = hardware.name != "cpu"
    shared = config.placement == "colocated" and on_gpus
    trainer = tuple(trainer_memory(config, folder))
    kept = max(sum(memory.parts[part] for part in STATE) for memory in trainer) + RUNTIME
    engine = engine_memory(config, folder, hardware.memory - RUNTIME - (kept if shared else 0))
    limits = _on_gpus(hardware, trainer, shared) if on_gpus else _on_this_machine(config, trainer, engine)
    nodes, misplaced = _nodes(config)
    broken = [limit for limit in limits if not limit.holds]
    worst = str(max(broken, key=lambda limit: limit.need / limit.have)) if broken else None
    return Fit(
        hardware,
        layout.ranks if shared else layout.ranks + layout.engines * layout.tensor,
        nodes,
        shared,
        trainer,
        engine,
        tuple(limits),
        misplaced or worst or engine.problem,
    )


def _on_gpus(hardware: Device, trainer: tuple[Memory, ...], shared: bool) -> list[Limit]:
    runtime = RUNTIME * (2 if shared else 1)
    remedies = "actor.parallel, actor.recompute, actor.max_tokens_per_pack"
    return [
        Limit(f"a step of {memory.owner}", memory.total + runtime, hardware.memory, remedies)
        for memory in trainer
    ]


def _on_this_machine(config: RunConfig, trainer: tuple[Memory, ...], engine: EngineMemory) -> list[Limit]:
    """All processes share it. They take turns, but a CPU's allocator gives little back meanwhile."""
    parallel, engines = config.actor.parallel, config.engine
    ranks = parallel.tensor * parallel.data
    need = ranks * sum(memory.total for memory in trainer)
    need += engines.count * engines.tensor * engine.memory.total
    remedies = "actor.max_tokens_per_pack, engine.max_total_tokens, actor.parallel, engine.count"
    return [Limit("trainer and engines together", need, device("cpu").memory, remedies)]


def _nodes(config: RunConfig) -> tuple[int, str | None]:
    """How many nodes the layout needs, and why no number of them would do."""
    layout, per_node = run_layout(config), config.plan.devices_per_node
    if config.plan.device == "cpu":
        return 1, None
    devices = layout.ranks + layout.engines * layout.tensor
    least = ceil((layout.ranks if config.placement == "colocated" else devices) / per_node)
    refusal = ""
    for count in range(least, least + layout.engines + 2):  # groups that do not divide a node leave gaps
        nodes = [Node(str(index), f"node {index}", cpus=devices, gpus=per_node) for index in range(count)]
        try:
            placement.plan(layout, nodes)
        except PlacementError as error:
            refusal = refusal or str(error)
        else:
            return count, None
    return least, refusal
