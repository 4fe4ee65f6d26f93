"""Host memory of the fullest node: trainer ranks, engines, the driver. Units: bytes."""

from pathlib import Path

from treepo.config.run import RunConfig
from treepo.planning.engine import EngineMemory
from treepo.planning.hardware import GIB
from treepo.planning.memory import Memory
from treepo.planning.places import ranks_of_a_node
from treepo.planning.trainer_host import host_memory

ENGINE_PROCESS = 3 * GIB
"""Code and libraries of an engine's scheduler and of what talks to it, for each of its ranks."""
DRIVER = 4 * GIB
"""Of the driver: code, prompts, a step's trees; and Ray's own processes."""


def node_memory(config: RunConfig, folder: Path, engine: EngineMemory) -> Memory:
    """Where ranks and engines share nodes, a full one has both."""
    trainer, plan = host_memory(config, folder), config.plan
    ranks = ranks_of_a_node(config, config.engine.count * config.engine.tensor)
    parts, notes = dict(trainer.parts), dict(trainer.notes)
    parts["engines"] = ranks * ENGINE_PROCESS
    notes["engines"] = f"{ranks} x {ENGINE_PROCESS / GIB:g} GiB of code and libraries"
    if config.placement == "colocated" and plan.device != "cpu":
        parts["engines' weights at rest"] = ranks * engine.memory.parts["weights"]
        notes["engines' weights at rest"] = "while the trainer computes"
    parts["reward workers"] = config.reward.workers * config.reward.memory_mb * 2.0**20
    notes["reward workers"] = f"{config.reward.workers} of at most {config.reward.memory_mb} MiB"
    parts["driver"] = DRIVER
    notes["driver"] = "code, prompts, a step's trees; Ray"
    return Memory("host memory of a node", parts, notes)
