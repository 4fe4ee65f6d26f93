"""Starts the SGLang processes of one engine, notices when one dies, and ends them.

SGLang's own front end assumes that it owns the process that constructs it: when a child fails, it kills every
child of this process and then the process itself, and its `shutdown` ends children that it did not start.
Here only SGLang's own processes are ended, and a death is an error of the requests in flight.
"""

import asyncio
import atexit
import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from sglang_rollout.weight_loader import LOADER
from treepo.config.engine import EngineConfig
from treepo.errors import DeadEngineError, EngineError

_END_SECONDS = 10  # from SIGTERM to SIGKILL
# The device's memory can be offloaded and reloaded. The weights are kept in the host's memory meanwhile, so
# that an engine that misses an update still has the weights of a version.
_SHARES_DEVICE = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
CPU_KV_TOKENS = 1 << 17  # on a CPU: SGLang's default takes most of the memory, which others need too
RESERVED_TOKENS = 64
"""KV tokens that SGLang sets aside for the tokens that a request may still sample; its default is 4096.

The router admits only as many trees as fit, so little reserve is needed. A large one does harm: a request
that waits for it has its prefix unlocked and evicted. If the reserve is too small, SGLang retracts the
request with the fewest tokens and prefills it again, which costs little.
"""


class SGLangProcesses:
    """One running SGLang. The constructor blocks until the model is loaded.

    manager: SGLang's tokenizer manager, which takes requests and control messages. ranks: number of processes
    that hold weights. kv_tokens: tokens in the KV cache. longest: most tokens of one context and its
    continuation together; SGLang silently shortens a longer request. Raises EngineError if SGLang does not
    start.
    """

    def __init__(self, model: Path, dtype: str, config: EngineConfig, seed: int, shares_device: bool) -> None:
        arguments = _arguments(model, dtype, config, seed) | (_SHARES_DEVICE if shares_device else {})
        with _start_environment(config):
            engine = _start(arguments)
        atexit.register(self.close)  # multiprocessing joins its children at exit, so they must have ended
        self.manager: Any = engine.tokenizer_manager
        self.manager._subprocess_watchdog.stop()
        limits = engine._scheduler_init_result.scheduler_infos[0]
        self.kv_tokens = int(limits["max_total_num_tokens"])
        self.longest = int(limits["max_req_input_len"])
        self.ranks = config.tensor
        self._children = [psutil.Process(pid) for pid in engine.get_all_child_pids()]
        self._death: asyncio.Future[str] | None = None
        self._watched: list[int] = []
        self._closed = False

    @property
    def death(self) -> asyncio.Future[str]:
        """Resolves to the reason when SGLang can no longer answer. Binds this object to the running loop."""
        if self._death is None:
            loop = asyncio.get_running_loop()
            self._death = loop.create_future()
            if self._closed:
                self._death.set_result("the engine is closed")
                return self._death
            for child in self._children:
                descriptor = os.pidfd_open(child.pid)
                self._watched.append(descriptor)
                loop.add_reader(descriptor, self._die, f"SGLang's process {child.pid} ended")
            # Instead of SGLang's auto_create_handle_loop, which would take over SIGTERM and SIGQUIT.
            self.manager.event_loop = loop
            answers = loop.create_task(self.manager.handle_loop())
            answers.add_done_callback(self._answers_ended)
            self.manager.asyncio_tasks.add(answers)
        return self._death

    async def bounded[T](self, work: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
        """The result of `work`. Raises EngineError at the deadline, DeadEngineError when SGLang dies."""
        death = self.death
        if death.done():
            work.close()
            raise DeadEngineError(death.result())
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((death, task), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done():
            return task.result()
        if death.done():
            raise DeadEngineError(death.result())
        raise EngineError(f"{what} took longer than {seconds:g} s")

    def close(self) -> None:
        """End SGLang's processes and no others. May be called again."""
        from sglang_rollout.without_detokenizer import close_sockets

        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._death is not None and not self.manager.event_loop.is_closed():
            self._die("the engine is closed")
            for task in self.manager.asyncio_tasks:
                task.cancel()
        close_sockets(self.manager)
        _end(self._children)

    def _answers_ended(self, answers: asyncio.Task[None]) -> None:
        if not answers.cancelled():
            self._die(f"SGLang's answers cannot be read: {answers.exception()!r}")

    def _die(self, reason: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_result(reason)
        for descriptor in self._watched:
            self.manager.event_loop.remove_reader(descriptor)
            os.close(descriptor)
        self._watched = []


def _start(arguments: dict[str, Any]) -> Any:
    """A running `sglang.Engine`. If the start fails, every process that it started is ended."""
    from sglang_rollout.without_detokenizer import EngineWithoutDetokenizer

    others = set(multiprocessing.active_children())
    try:
        engine: Any = EngineWithoutDetokenizer(**arguments)
    except BaseException as error:
        started = set(multiprocessing.active_children()) - others
        _end([psutil.Process(child.pid) for child in started if child.pid is not None])
        if isinstance(error, Exception):  # of any type: SGLang passes on whatever its modules raise
            raise EngineError(f"SGLang does not start on {arguments['model_path']}: {error}") from error
        raise
    atexit.unregister(engine.shutdown)
    engine.send_to_rpc.close(linger=0)  # for calls that are not made here
    return engine


def _arguments(model: Path, dtype: str, config: EngineConfig, seed: int) -> dict[str, Any]:
    """SGLang's arguments; everything else is its default."""
    arguments = {
        "model_path": str(model),
        "dtype": dtype,
        "random_seed": seed,
        "trust_remote_code": False,
        # SGLang 0.5.16 imports the folder's code for an architecture that it does not know, trusted or not.
        "json_model_override_args": '{"auto_map": {}}',
        "tp_size": config.tensor,
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "max_total_tokens": config.max_total_tokens,
        "mem_fraction_static": config.memory_fraction,
        "attention_backend": config.attention_backend,
        "weight_version": "0",
        "custom_weight_loader": [LOADER],
        "log_level": config.log_level,
    }
    if threading.current_thread() is threading.main_thread():
        arguments["custom_sigquit_handler"] = _child_failed
    if torch.cuda.is_available():
        return arguments
    return arguments | {
        "device": "cpu",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,  # there is no device to overlap with
        "sleep_on_idle": True,  # the trainer computes on the same cores
        "max_total_tokens": config.max_total_tokens or CPU_KV_TOKENS,
    }


def _child_failed(signum: int, frame: object) -> None:
    """A failing child sends SIGQUIT before it ends; `SGLangProcesses.death` reports its end."""


def _rank_environment(tensor: int) -> dict[str, str]:
    """Environment of `tensor` ranks on one machine's CPU: each gets a share of the cores.

    SGLang binds each rank to a NUMA node of its own and refuses to start more ranks than nodes, unless the
    cores are named. Without sgl_kernel's CPU build nothing is bound.
    """
    cores = os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    return {
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join([f"0-{cores - 1}"] * tensor),
        "OMP_NUM_THREADS": str(max(threads // tensor, 1)),
    }


@contextmanager
def _start_environment(config: EngineConfig) -> Iterator[None]:
    """Set the environment and logging that SGLang's processes inherit; restore our own afterwards."""
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process compiles thousands of modules again
    os.environ["HF_HUB_OFFLINE"] = "1"  # models are folders
    os.environ["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"] = str(RESERVED_TOKENS)
    os.environ["PYTHONWARNINGS"] = "ignore"  # about kernels for absent devices
    os.environ["TQDM_DISABLE"] = "1"
    if config.tensor > 1 and not torch.cuda.is_available():
        os.environ.update(_rank_environment(config.tensor))
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


def _end(children: Sequence[psutil.Process]) -> None:
    """End these processes and their children, and wait until they have ended.

    psutil also compares start times, so it never hits a new process with the id of one that has ended.
    """
    family: list[psutil.Process] = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            family += [child, *child.children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=_END_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_END_SECONDS)
