"""Environment variables of the processes that compute: engines and trainer ranks.

Ray sets them in an actor's process before Python starts, because OpenMP and CUDA read them once, when torch
is imported or first used. If the user sets a variable where the run starts, every process on every node gets
the user's value.
"""

import os
from collections.abc import Mapping

from treepo.cluster.placement import Node
from treepo.config.run import RunConfig

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # two names of one setting


def engine_environment(threads: int, *, on_gpus: bool) -> dict[str, str]:
    """Variables of an engine's actor, which SGLang's processes inherit.

    threads: CPU threads of a process. on_gpus: whether the cluster has GPUs.
    """
    return _of_user(_openmp(threads)) | _visible(on_gpus)


def trainer_environment(threads: int, config: RunConfig, *, on_gpus: bool) -> dict[str, str]:
    """Variables of a trainer rank's actor; arguments as above."""
    variables = _openmp(threads)
    if not set(_ALLOCATOR) & set(os.environ):
        # Packs differ in length, and fixed segments fragment. Such memory can be shared with another process
        # only where one may trace the other, so what `weights.transport` shares is allocated without it.
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if config.trainer.parallel.tensor > 1:
        # One queue of kernels: a collective that is launched before a matrix product also starts before it,
        # by which Megatron-Core overlaps the two.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    variables = _of_user(variables) | {name: os.environ[name] for name in _ALLOCATOR if name in os.environ}
    if config.weights.transport == "broadcast":
        variables |= _nccl_of_engines(config.engine.sglang)
    return variables | _visible(on_gpus)


def _nccl_of_engines(sglang: Mapping[str, object]) -> dict[str, str]:
    """What SGLang sets in its processes. Trainer ranks join their communicator, in which all must agree.

    An argument of SGLang that asks for a feature overrides the environment.
    """
    memory = bool(sglang.get("enable_symm_mem"))
    asked = {
        "NCCL_CUMEM_ENABLE": memory,
        "NCCL_NVLS_ENABLE": memory or bool(sglang.get("enable_nccl_nvls")),
    }
    return {name: "1" if wanted else os.environ.get(name, "0") for name, wanted in asked.items()}


def threads_of(node: Node, cores: int, processes: int) -> int:
    """CPU threads of a process on the node.

    With GPUs, each process has the cores of one GPU. Without, `processes` of its kind compute at the same
    time and share all cores; engines and trainer ranks take turns.
    """
    return max(cores // (node.gpus or max(processes, 1)), 1)


def _openmp(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),  # Ray would give one thread
        # By default a thread that waits for others spins, and takes the core from a process that has work.
        "OMP_WAIT_POLICY": "passive",
    }


def _visible(on_gpus: bool) -> dict[str, str]:
    """Hides the GPUs of a machine that gives the cluster none (`treepo launch --gpus 0`): Ray leaves them
    visible to actors that have none. To an actor that has some it shows those.
    """
    return {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}


def _of_user(defaults: Mapping[str, str]) -> dict[str, str]:
    """The defaults, with the user's value of each variable that is set."""
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
