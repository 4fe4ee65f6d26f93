"""What tensor-parallel ranks of one engine need on the CPU platform: gloo alone, and a share of the cores."""

import os
from typing import Any


def gloo_only(*arguments: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before `GroupCoordinator.__init__`, which builds NCCL communicators wherever NCCL's library is found;
    PyTorch's CUDA build brings it to machines without a GPU too.
    """
    return arguments, keywords | {"use_pynccl": False, "use_custom_allreduce": False}


def rank_environment(tensor: int) -> dict[str, str]:
    """Environment of `tensor` ranks on one machine.

    SGLang wants to bind each rank to a NUMA node of its own, and refuses to start with more ranks than nodes
    unless it is told the cores; without sgl_kernel's CPU build nothing is bound.
    """
    cores = os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    return {
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join([f"0-{cores - 1}"] * tensor),
        "OMP_NUM_THREADS": str(max(threads // tensor, 1)),
    }
