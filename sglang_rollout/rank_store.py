"""The store through which the ranks of one engine find each other.

SGLang chooses a free port and binds it seconds later in another process; meanwhile any connection of the
machine may take it. Here the process that starts SGLang listens from the beginning, and the ranks connect to
it, as torch lets the processes of a launcher do.
"""

from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.weight_sync.listening_store import listening_store

_PATIENCE = timedelta(minutes=30)  # SGLang's deadlines come first
_HOST = "127.0.0.1"  # an engine runs on one node


def open_store() -> TCPStore:
    """A store at a port that the system chooses (its `port`). It listens while the object lives."""
    return listening_store(_HOST, _PATIENCE)


def store_variables(port: int) -> dict[str, str]:
    """The environment in which SGLang's ranks meet at the store."""
    return {
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "env://",
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank opens a store of its own
    }
