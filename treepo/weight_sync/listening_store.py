"""The store through which the processes of a group find each other, at a port that nothing else can take."""

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there


def listening_store(host: str, patience: timedelta) -> TCPStore:
    """Open a store on `host` at a port that the system chooses (its `port`). host: also an IPv6 address.

    The port is never free between its choice and its use: the socket that chose it listens while the object
    lives. patience: how long a process waits for a key.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, None, True, patience, wait_for_workers=False, master_listen_fd=listener.detach()
    )
