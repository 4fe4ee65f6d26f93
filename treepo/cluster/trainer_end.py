"""Kills the processes of a lost trainer and waits until their device memory is free."""

import asyncio
from collections.abc import Iterable
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treepo.cluster.nodes import living_nodes
from treepo.cluster.trainer_rank import RankProcess
from treepo.data.daemon_thread import in_thread
from treepo.errors import TrainerError

_END_SECONDS = 60.0  # the kernel frees a process's memory before it is gone
_REMOTE_SECONDS = 30.0  # more, for a node to start a process that looks


async def end_processes(processes: Iterable[RankProcess]) -> None:
    """Kill the processes that still run, also stopped ones, and wait until all are gone.

    Raises TrainerError if one does not go. Processes on nodes that have left the cluster count as gone.
    """
    here = ray.get_runtime_context().get_node_id()
    alive = living_nodes()
    await asyncio.gather(
        *(_end(process, at_home=process.node == here) for process in processes if process.node in alive)
    )


async def _end(process: RankProcess, *, at_home: bool) -> None:
    pid, started = process.pid, process.started
    if at_home:
        gone = await in_thread(lambda: end_process(pid, started))
    else:
        there = NodeAffinitySchedulingStrategy(process.node, soft=False)
        remote: Any = ray.remote(end_process)
        call = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid, started)
        try:
            gone = await asyncio.wait_for(call, _END_SECONDS + _REMOTE_SECONDS)
        except (RayError, TimeoutError):  # its node has left by now, or will be found to have
            gone = process.node not in living_nodes()
    if not gone:
        raise TrainerError(
            f"the trainer cannot start again: process {pid} of a lost rank has not ended within "
            f"{_END_SECONDS:g} s after SIGKILL"
        )


def end_process(pid: int, started: float) -> bool:
    """Kill a process of this machine, unless another one has its id by now; returns whether it is gone."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1:
            return True
        process.kill()
        process.wait(_END_SECONDS)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
