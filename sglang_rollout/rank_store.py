"""The store through which the ranks of one engine find each other, and report to the engine's first process.

SGLang chooses a free port and binds it seconds later in another process; meanwhile any connection of the
machine may take it. Here the process that starts SGLang's first ranks listens from the beginning, and all
ranks connect to it, as torch lets the processes of a launcher do.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.weight_sync.listening_store import listening_store

_PATIENCE = timedelta(minutes=30)  # SGLang's deadlines come first
LOOPBACK = "127.0.0.1"  # for an engine on one node


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and as whom the ranks of one node meet those of the others. share: their node's number among the
    engine's. host, port: of the store, which is on the node of share 0.
    """

    host: str
    port: int
    share: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def open_store(host: str) -> TCPStore:
    """A store on `host` at a port that the system chooses (its `port`). It listens while the object lives."""
    return listening_store(host, _PATIENCE)


def store_variables(meeting: Meeting) -> dict[str, str]:
    """The environment in which SGLang's ranks meet at the store."""
    return {
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "env://",
        "MASTER_ADDR": meeting.host,
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank opens a store of its own
    }


def connect_to_store() -> TCPStore:
    """Connect a rank's process to the store, which `store_variables` names."""
    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE
    )
