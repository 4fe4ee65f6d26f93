"""SGLang's engine for tokens in, tokens out."""

from multiprocessing import Process
from typing import Any

from sglang.srt.entrypoints.engine import Engine


class TokenEngine(Engine):
    """Without the detokenizer's process: with `skip_tokenizer_init` nothing is ever sent to it, and starting
    it costs as much time and memory as the imports of a scheduler.
    """

    @classmethod
    def _launch_detokenizer_subprocesses(cls, *_: Any, **__: Any) -> tuple[list[Process], list[str]]:
        return [], []
