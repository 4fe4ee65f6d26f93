"""A further share of an engine in a process of its own, as on another node."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_rollout.processes import SGLangProcesses
from sglang_rollout.rank_store import LOOPBACK, Meeting, open_store
from treepo.config.engine import EngineConfig


@contextmanager
def further_share(folder: Path, **settings: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Start share 1 of an engine with these keys of `EngineConfig`.

    Gives what the first share needs to meet it, and a connection: receive the ids of its processes from it,
    once both have started.
    """
    store = open_store(LOOPBACK)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, folder, settings, Meeting(LOOPBACK, store.port, share=1))
    )
    process.start()
    theirs.close()
    try:
        yield {"meeting": Meeting(LOOPBACK, store.port, share=0), "store": store}, ours
    finally:
        ours.close()
        process.join(60)
        process.kill()


def _serve(connection: Any, folder: Path, settings: dict[str, Any], meeting: Meeting) -> None:
    """Run the share until the other end of the connection is closed."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    config = EngineConfig.model_validate({"max_total_tokens": 50_000} | settings)
    share = SGLangProcesses(
        folder, "float32", config, 0, shares_device=False, paths_at_once=None, meeting=meeting
    )
    try:
        connection.send([child.pid for child in share._children])
        connection.poll(None)
    finally:
        share.close()
