"""What processes of one machine, and machines among themselves, need of the network."""

import ipaddress
import socket
from collections.abc import Mapping

from treepo.doctor.outcome import Outcome, failed, passed

_SECONDS = 10.0
_MESSAGE = b"treepo"
_HOSTS = "give the host a line in /etc/hosts with the address that other nodes reach it at"


def loopback() -> Outcome:
    """A port of 127.0.0.1 can be listened on and connected to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_SECONDS)
        address = server.getsockname()
        with socket.create_connection(address, _SECONDS) as client, server.accept()[0] as accepted:
            client.sendall(_MESSAGE)
            received = accepted.recv(len(_MESSAGE), socket.MSG_WAITALL)
    if received != _MESSAGE:
        return failed(
            f"{address[0]}:{address[1]}: sent {_MESSAGE!r}, received {received!r}", "see the firewall"
        )
    return passed(f"{address[0]}:{address[1]} took a connection")


def host_name() -> Outcome:
    """The host's name is one of its own addresses: gloo and Ray look it up to find themselves."""
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return failed(f"{name} resolves to nothing ({error.strerror})", _HOSTS)
    return judge_host_name(name, {str(address[0]): is_own(family, address) for family, *_, address in found})


def judge_host_name(name: str, addresses: Mapping[str, bool]) -> Outcome:
    """addresses: what the name resolves to, and whether this machine has it; one is enough for gloo."""
    own = [address for address, is_here in addresses.items() if is_here]
    strange = [address for address in addresses if address not in own]
    if not own:
        return failed(f"{name} is {', '.join(strange)}, which this host does not have", _HOSTS)
    found = f"{name} is {', '.join(own)}"
    if strange:
        found += f" (and {', '.join(strange)}, which this host does not have)"
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in own):
        found += ": enough for one node; others cannot reach it there"
    return passed(found)


def is_own(family: int, address: tuple) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it. address: with port 0."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:  # also where the machine has no such family
        return False
    return True
