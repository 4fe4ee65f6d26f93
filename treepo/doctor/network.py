"""What processes of one machine, and machines among themselves, need of the network."""

import ipaddress
import socket
from collections.abc import Sequence

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
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    return judge_host_name(name, addresses, [address for address in addresses if is_own(address)])


def judge_host_name(name: str, addresses: Sequence[str], own: Sequence[str]) -> Outcome:
    """addresses: what the name resolves to. own: those of them that this machine has."""
    strange = [address for address in addresses if address not in own]
    if strange:
        return failed(
            f"{name} is {', '.join(addresses)}, but {', '.join(strange)} is not of this host", _HOSTS
        )
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in own):
        return passed(f"{name} is {', '.join(own)}: enough for one node; others cannot reach it there")
    return passed(f"{name} is {', '.join(own)}")


def is_own(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
