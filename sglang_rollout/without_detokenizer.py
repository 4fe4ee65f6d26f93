"""SGLang's own `Engine`, started without its detokenizer: tokens in, tokens out."""

import tempfile
from multiprocessing import Process
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_rollout.scheduler_process import run_scheduler


class EngineWithoutDetokenizer(Engine):
    """Does not start the detokenizer's process: with `skip_tokenizer_init`, SGLang sends nothing to it, and
    its start costs as much time and memory as a scheduler's imports.

    If a start fails, the sockets that it opened are closed here. Otherwise the garbage collector may finalize
    their context first, which then waits for them for ever.
    """

    run_scheduler_process_func = staticmethod(run_scheduler)

    def __init__(self, **arguments: Any) -> None:
        self._manager: Any = None
        try:
            super().__init__(**arguments)
        except BaseException:
            if self._manager is not None:
                close_sockets(self._manager)
            raise

    def init_tokenizer_manager_func(self, *arguments: Any) -> Any:
        """SGLang's hook for making the tokenizer manager, which opens the sockets."""
        self._manager, templates = init_tokenizer_manager(*arguments)
        return self._manager, templates

    @classmethod
    def _launch_subprocesses(cls, server_args: ServerArgs, *arguments: Any, **named: Any) -> Any:
        """Name SGLang's file in /dev/shm, which it never removes, by the folder of its temporary files."""
        ports = PortArgs.init_new(server_args)
        ports.instance_id = Path(tempfile.gettempdir()).name
        return super()._launch_subprocesses(server_args, *arguments, port_args=ports, **named)

    @classmethod
    def _launch_detokenizer_subprocesses(cls, *_: Any, **__: Any) -> tuple[list[Process], list[str]]:
        return [], []


def close_sockets(manager: Any) -> None:
    """Close a tokenizer manager's sockets without waiting for messages that nobody will read."""
    for socket in (manager.send_to_scheduler, manager.recv_from_detokenizer):
        socket.close(linger=0)
