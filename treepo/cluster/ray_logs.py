"""Keeps Ray's logs of a run that failed.

Ray's processes write their standard error, and so that of engines and trainer ranks, below Ray's own folder.
That folder is temporary if this project started Ray.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from treepo.data.temporary_folder import PREFIX
from treepo.errors import AllocationError, ConfigError, DataError, ModelError, PlacementError, shortened

KEPT = "ray_logs"
"""The folder in a run folder that has Ray's logs of the last failure."""
_BAD_INPUT = (ConfigError, DataError, ModelError, PlacementError, AllocationError)
_log = logging.getLogger(__name__)


def log_folder() -> Path:
    """Ray's logs on this node. Ray has no public name for it."""
    return Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[reportAttributeAccessIssue]


@contextmanager
def kept_after_failure(out: Path | None) -> Iterator[None]:
    """If the body fails, copy the logs of this node's Ray into the folder `out`, and let the error name the
    copies.

    The logs of a cluster that was started by hand stay where they are. Bad input does not need them.
    """
    logs = log_folder()
    try:
        yield
    except Exception as error:
        ours = any(part.startswith(PREFIX) for part in logs.parts)
        if out is not None and ours and not all(isinstance(single, _BAD_INPUT) for single in _single(error)):
            _keep(logs, out.resolve() / KEPT, error)
        raise


def _keep(logs: Path, kept: Path, error: Exception) -> None:
    try:
        if kept.exists():
            shutil.rmtree(kept)
        shutil.copytree(logs, kept, symlinks=True)
    except OSError as failure:  # the disk may be the reason why the run failed
        reason = shortened(failure.strerror or str(failure), 300)  # copytree lists the errors of all files
        _log.warning("Ray's logs cannot be kept in %s: %s", kept, reason)
        shutil.rmtree(kept, ignore_errors=True)
        return
    _log.info("Ray's logs, of %s, are in %s", logs, kept)
    for single in _single(error):
        single.args = tuple(
            said.replace(str(logs.resolve()), str(kept)).replace(str(logs), str(kept))
            if isinstance(said, str)
            else said
            for said in single.args
        )


def _single(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group of errors, or the one."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _single(inner)
    else:
        yield error
