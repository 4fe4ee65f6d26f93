"""What one rank does for all, in such a way that its failure is every rank's: none is left waiting."""

from collections.abc import Callable

import torch.distributed as dist
from safetensors import SafetensorError

from treepo.errors import CheckpointError

FAILURES = (OSError, SafetensorError)


def on_first_rank(work: Callable[[], None], what: str) -> None:
    """Run `work` on rank 0. Where a file or folder cannot be written there, every rank raises the same
    CheckpointError, which begins with `what`.
    """
    failure = ""
    if dist.get_rank() == 0:
        try:
            work()
        except FAILURES as error:
            failure = f"{what}: {reason(error)}"
    raise_everywhere(failure)


def raise_everywhere(failure: str) -> None:
    """Every rank raises rank 0's failure, if that is not empty."""
    shared = [failure]
    dist.broadcast_object_list(shared, src=0)
    if shared[0]:
        raise CheckpointError(shared[0])


def reason(error: BaseException) -> str:
    """What went wrong, in one line, and with which file."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # of a copy, the target
        return f"{error.strerror}: {name}" if name else error.strerror
    return " ".join(str(error).split())
