"""The secret of one launch: a file beside the run folder that only its owner can read.

All nodes of a launch see the run folder. So whoever can read the file is a node of the launch, or its user;
whoever only reaches the rendezvous over the network is not. The file also holds Ray's token, which therefore
never crosses the rendezvous.
"""

import asyncio
import glob
import hashlib
import hmac
import json
import os
import re
import secrets as random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from treepo.errors import AllocationError

_ID = re.compile(r"[0-9a-f]{16}")
_SEEN_SECONDS = 60.0  # for a network file system to show a file that another node has written
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class LaunchKey:
    """id: names the file. secrets: the environment variables that give access to the launch's Ray."""

    id: str
    key: str = field(repr=False)
    secrets: Mapping[str, str] = field(repr=False)

    def proof(self, role: str, *nonces: str) -> str:
        """Show that `role` ("head" or "node") has the key, without showing the key."""
        text = "\0".join([role, *nonces])
        return hmac.new(self.key.encode(), text.encode(), hashlib.sha256).hexdigest()

    def proves(self, proof: object, role: str, *nonces: str) -> bool:
        expected = self.proof(role, *nonces)
        return isinstance(proof, str) and hmac.compare_digest(proof.encode(), expected.encode())


def new_nonce() -> str:
    return random.token_hex(16)


@contextmanager
def shared_key(out: Path, secrets: Mapping[str, str]) -> Iterator[LaunchKey]:
    """Write a new key for the launch of the run in folder `out`; remove it at the end of the body.

    Raises AllocationError if the file cannot be written.
    """
    key = LaunchKey(random.token_hex(8), random.token_hex(32), secrets)
    path = _path(out, key.id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as text:
            json.dump({"key": key.key, "secrets": dict(secrets)}, text)
            text.flush()
            os.fsync(text.fileno())
    except OSError as error:
        raise AllocationError(f"out: the nodes' key {path}: {error.strerror}") from None
    try:
        yield key
    finally:
        with suppress(OSError):
            path.unlink()


def remove_old_keys(out: Path, key: LaunchKey) -> None:
    """Remove the files of launches of this run that were killed. Only while no other launch runs it."""
    own = _path(out, key.id)
    for path in own.parent.glob(f"{glob.escape(_path(out, '').name)}*"):
        if path != own:
            with suppress(OSError):
                path.unlink()


async def read_key(out: Path, key_id: object) -> LaunchKey:
    """The key that the head has written. Raises AllocationError if this node does not see the head's file."""
    if not isinstance(key_id, str) or not _ID.fullmatch(key_id):
        raise AllocationError("what answers at the head's address is not a launch's head")
    path = _path(out, key_id)
    deadline = asyncio.get_running_loop().time() + _SEEN_SECONDS
    while True:
        try:
            content = json.loads(path.read_text())
            return LaunchKey(key_id, content["key"], content["secrets"])
        except FileNotFoundError as error:
            reason = error.strerror
        except OSError as error:
            raise AllocationError(f"out: the head's key {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            reason = "it is not whole"
        if asyncio.get_running_loop().time() > deadline:
            raise AllocationError(
                f"out: the head's key {path}: {reason}; all nodes must share the file system of `out`, and "
                "run as one user"
            )
        await asyncio.sleep(_POLL_SECONDS)


def _path(out: Path, key_id: str) -> Path:
    return out.resolve().parent / f".{out.name}.launch-{key_id}"
