"""A Ray session: joins the cluster that RAY_ADDRESS names, else starts one on this machine and ends it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def ray_session(actors: int) -> Iterator[None]:
    """Ray, for as long as the block runs. Only processes that it started are ended.

    actors: engines and trainer ranks. A cluster of our own has a slot for every one, so that small machines
    can hold layouts of several ranks; on a cluster that was there before, Ray's own accounting decides.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Python's compiled modules halve the start of every worker; Ray hands our environment to them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        slots = max(actors, os.cpu_count() or 1)
        ray.init(
            address="local",
            num_cpus=slots,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


def actor_environment(**more: str) -> dict[str, dict[str, str]]:
    """Ray's runtime environment for an actor that computes; `more` variables are set in it too.

    Ray would give it one thread; engine and trainer take turns, so each may use every core.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return {"env_vars": {"OMP_NUM_THREADS": threads} | more}


def gpu_count() -> int:
    """CUDA devices of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
