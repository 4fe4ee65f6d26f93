"""Starts the SGLang processes of one engine, notices when one dies, and ends them.

SGLang's own front end assumes that it owns the process that constructs it: when a child fails, it kills every
child of this process and then the process itself, and its `shutdown` ends children that it did not start.
Here only SGLang's own processes are ended, and a death is an error of the requests in flight.
"""

import asyncio
import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from sglang_rollout.arguments import sglang_arguments
from sglang_rollout.child_output import ChildOutput
from sglang_rollout.rank_store import LOOPBACK, Meeting, open_store
from sglang_rollout.start_environment import start_environment
from treepo.config.engine import EngineConfig
from treepo.config.trainer import LoraConfig
from treepo.data.temporary_folder import TemporaryFolder
from treepo.errors import DeadEngineError, EngineError, one_line

_END_SECONDS = 10  # from SIGTERM to SIGKILL
_SOCKET_ROOM = len("/tmp12345678")  # of SGLang's sockets
_OUTPUT_SECONDS = 0.2  # for the last output of a process that has died, while others run


class SGLangProcesses:
    """The processes of one SGLang on one node. The constructor blocks until the model is loaded, on every
    node if there are several.

    meeting: where they meet those of other nodes; None if there are no others. store: of the meeting, if it
    is on this node. manager: SGLang's tokenizer manager, which takes requests and control messages; None
    unless this is share 0. ranks: number of processes that hold weights, on all nodes. stages: of the
    pipeline. kv_tokens: tokens in the KV cache. longest: most tokens of one context and its continuation
    together; SGLang silently shortens a longer request. Raises EngineError if SGLang does not start.
    """

    def __init__(
        self,
        model: Path,
        dtype: str,
        config: EngineConfig,
        seed: int,
        *,
        shares_device: bool,
        paths_at_once: int | None,
        routes: bool = False,
        lora: LoraConfig | None = None,
        meeting: Meeting | None = None,
        store: TCPStore | None = None,
    ) -> None:
        arguments = sglang_arguments(
            model,
            dtype,
            config,
            seed,
            shares_device=shares_device,
            paths_at_once=paths_at_once,
            routes=routes,
            lora=lora,
            meeting=meeting,
        )
        self._output = ChildOutput()
        self._folder = TemporaryFolder(_SOCKET_ROOM)
        if meeting is None:
            store = open_store(LOOPBACK)
            meeting = Meeting(LOOPBACK, store.port, share=0)
        self.store = store
        try:
            with (
                start_environment(config, shares_device, meeting),
                self._folder.used(),
                self._output.recorded(),
            ):
                engine = _start(arguments)
        except Exception as error:  # of any type: SGLang passes on whatever its modules raise
            self._folder.close()
            said = self._output.reason(_END_SECONDS) or one_line(error)
            raise EngineError(f"SGLang does not start on {model}: {said}") from error
        atexit.register(self.close)  # multiprocessing joins its children at exit, so they must have ended
        self.manager: Any = engine.tokenizer_manager
        if self.manager is not None:
            self.manager._subprocess_watchdog.stop()
        limits = engine._scheduler_init_result.scheduler_infos[0]
        self.kv_tokens = int(limits["max_total_num_tokens"])
        self.longest = int(limits["max_req_input_len"])
        self.ranks, self.stages = config.ranks, config.pipeline
        self._children = [psutil.Process(pid) for pid in engine.get_all_child_pids()]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death: asyncio.Future[str] | None = None
        self._watched: list[int] = []
        self._closed = False

    @property
    def death(self) -> asyncio.Future[str]:
        """Resolves to the reason when SGLang can no longer answer. Binds this object to the running loop."""
        if self._death is None:
            loop = self._loop = asyncio.get_running_loop()
            self._death = loop.create_future()
            if self._closed:
                self._death.set_result("the engine is closed")
                return self._death
            for child in self._children:
                descriptor = os.pidfd_open(child.pid)
                self._watched.append(descriptor)
                loop.add_reader(descriptor, self._child_ended, child.pid)
            if self.manager is not None:
                # Instead of SGLang's auto_create_handle_loop, which would take over SIGTERM and SIGQUIT.
                self.manager.event_loop = loop
                answers = loop.create_task(self.manager.handle_loop())
                answers.add_done_callback(self._answers_ended)
                self.manager.asyncio_tasks.add(answers)
        return self._death

    async def bounded[T](self, work: Coroutine[Any, Any, T], seconds: float | None, what: str) -> T:
        """The result of `work`. Raises EngineError at the deadline, DeadEngineError when SGLang dies.

        seconds: None for no deadline. what: names the work in the error.
        """
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
        assert seconds is not None
        raise EngineError(f"{what} took longer than {seconds:g} s")

    def close(self) -> None:
        """End SGLang's processes and no others. May be called again."""
        from sglang_rollout.without_detokenizer import close_sockets

        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._loop is not None and not self._loop.is_closed():
            self._die("the engine is closed")
            for task in () if self.manager is None else self.manager.asyncio_tasks:
                task.cancel()
        if self.manager is not None:
            close_sockets(self.manager)
        _end(self._children)
        self._folder.close()

    def _child_ended(self, pid: int) -> None:
        said = self._output.reason(_OUTPUT_SECONDS)
        self._die(f"SGLang's process {pid} ended{f': {said}' if said else ''}")

    def _answers_ended(self, answers: asyncio.Task[None]) -> None:
        if not answers.cancelled():
            self._die(f"SGLang's answers cannot be read: {answers.exception()!r}")

    def _die(self, reason: str) -> None:
        assert self._death is not None
        assert self._loop is not None
        if not self._death.done():
            self._death.set_result(reason)
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._watched = []


def _start(arguments: dict[str, Any]) -> Any:
    """A running `sglang.Engine`. If the start fails, every process that it started is ended."""
    from sglang_rollout.without_detokenizer import EngineWithoutDetokenizer

    if threading.current_thread() is not threading.main_thread():  # else `sglang_arguments` has a handler
        _ignore_signals_of_children()
    others = set(multiprocessing.active_children())
    try:
        engine: Any = EngineWithoutDetokenizer(**arguments)
    except BaseException:
        started = set(multiprocessing.active_children()) - others
        _end([psutil.Process(child.pid) for child in started if child.pid is not None])
        raise
    atexit.unregister(engine.shutdown)
    if engine.send_to_rpc is not None:
        engine.send_to_rpc.close(linger=0)  # for calls that are not made here
    return engine


def _ignore_signals_of_children() -> None:
    """Outlive the SIGQUIT that a failing child of SGLang sends; `SGLangProcesses.death` reports its end.

    Python sets signal handlers in the main thread only, and an actor of Ray starts its engine in another.
    """
    ctypes.CDLL(None).signal(signal.SIGQUIT, ctypes.c_void_p(int(signal.SIG_IGN)))


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
