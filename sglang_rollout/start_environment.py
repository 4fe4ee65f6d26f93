"""The environment in which SGLang's processes start."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sglang_rollout.cuda_toolkit import cuda_variables
from sglang_rollout.rank_store import Meeting, store_variables
from treepo.config.engine import EngineConfig

RESERVED_TOKENS = 64
"""KV tokens that SGLang sets aside for the tokens that a request may still sample; its default is 4096.

The router admits only as many trees as fit, so little reserve is needed. A large one does harm: a request
that waits for it has its prefix unlocked and evicted. If the reserve is too small, SGLang retracts the
request with the fewest tokens and prefills it again, which costs little.
"""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # two names of one setting
_log = logging.getLogger(__name__)


@contextmanager
def start_environment(config: EngineConfig, shares_device: bool, meeting: Meeting) -> Iterator[None]:
    """Set the environment and logging that SGLang's processes inherit; restore our own afterwards.

    shares_device: whether SGLang's memory saver is on. meeting: of the ranks that are started here.
    """
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process compiles thousands of modules again
    os.environ["HF_HUB_OFFLINE"] = "1"  # models are folders
    os.environ["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"] = str(RESERVED_TOKENS)
    os.environ["PYTHONWARNINGS"] = "ignore"  # about kernels for absent devices
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"  # every share returns once its model is loaded
    os.environ.update(store_variables(meeting))
    if torch.cuda.is_available():
        os.environ.update(cuda_variables(environment))
    elif config.ranks > 1:
        os.environ.update(_rank_variables(config.tensor, config.ranks // (config.nodes or 1)))
    if shares_device:
        _forbid_expandable_segments()
    logging.getLogger("sglang").setLevel(config.log_level.upper())
    # It reports each signal handler and each dead child as an error; our exceptions say more.
    logging.getLogger("sglang.srt.entrypoints.engine").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)


def _rank_variables(tensor: int, here: int) -> dict[str, str]:
    """For the CPU of a machine that has `here` ranks of an engine: each gets an equal part of the cores.

    SGLang binds each of the `tensor` ranks to a NUMA node of its own and refuses to start more ranks than
    nodes, unless the cores are named. Without sgl_kernel's CPU build nothing is bound.
    """
    cores = os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    return {
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join([f"0-{cores - 1}"] * tensor),
        "OMP_NUM_THREADS": str(max(threads // here, 1)),
    }


def _forbid_expandable_segments() -> None:
    """Take torch's expandable segments out of the environment: the memory saver cannot release them."""
    for name in _ALLOCATOR:
        options = os.environ.get(name, "").split(",")
        kept = [option for option in options if not option.strip().startswith("expandable_segments")]
        if kept != options:
            _log.warning("%s: engines that share a GPU run without expandable_segments", name)
            os.environ[name] = ",".join(kept)
            if not kept:
                del os.environ[name]
