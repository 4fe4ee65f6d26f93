"""The running Ray cluster that RAY_ADDRESS names: asks it for a sign of life before anything depends on it.

Ray itself waits 40 seconds for a cluster that does not answer and then ends the process.
"""

import os
import re
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import grpc
from ray._private import services
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from treepo.errors import AllocationError, ClusterError, one_line

ANSWER_SECONDS = 10.0
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")


def named_cluster() -> str | None:
    """The value of RAY_ADDRESS, if it names a running cluster; `local` and an empty value do not."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def check_cluster(address: str) -> str:
    """Return the cluster's HOST:PORT once it has answered.

    Raises AllocationError if `address` is none that a Ray program can join, and ClusterError if nobody
    answers within ANSWER_SECONDS.
    """
    named = f"RAY_ADDRESS={address}"
    if address.startswith(("http://", "https://")):
        raise AllocationError(
            f"{named}: this is a job server's address, which `treepo launch` alone can use; expected the "
            "HOST:PORT that `ray start --head` shows, with port 6379 by default"
        )
    if address == "auto":
        address = _running_here(named)
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise AllocationError(
            f"{named}: expected HOST:PORT of a Ray cluster's head, `auto` for the one on this machine, or "
            "nothing to start Ray here"
        )
    channel = create_gcs_channel(address)
    try:
        alive = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
        request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[reportAttributeAccessIssue]  # generated code
        alive(request, timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        # grpc's errors are calls too; their type has no such methods.
        code, details = error.code(), error.details()  # type: ignore[reportAttributeAccessIssue]
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(f"{named}: the cluster refuses: {one_line(details)}") from None
        raise ClusterError(f"{named}: no Ray cluster answers at {address}: {one_line(details)}") from None
    finally:
        channel.close()
    return address


def check_job_server(address: str) -> None:
    """As `check_cluster`, for a command that submits a job: `address` may be the URL of the job server."""
    if not address.startswith(("http://", "https://")):
        check_cluster(address)
        return
    named = f"RAY_ADDRESS={address}"
    try:
        if not urlsplit(address).hostname:
            raise ValueError("no host")
        with build_opener(ProxyHandler({})).open(address, timeout=ANSWER_SECONDS):
            pass
    except HTTPError:
        pass  # it answers; whether it lets us in, its client will say
    except (ValueError, OSError, HTTPException) as error:
        reason = one_line(getattr(error, "reason", error))
        raise ClusterError(f"{named}: no job server answers: {reason}") from None


def _running_here(named: str) -> str:
    try:
        address: str | None = services.get_ray_address_from_environment("auto", None)
    except ConnectionError:
        address = None
    if address is None or address == "auto":
        raise ClusterError(f"{named}: no Ray cluster runs on this machine; `ray start --head` starts one")
    return address
