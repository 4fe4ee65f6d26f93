"""RAY_ADDRESS: a cluster that does not answer, or an address that is none, is one line."""

import socket
from collections.abc import Iterator

import pytest

from treepo.cluster import ray_address
from treepo.cluster.allocation import Flags, find_allocation
from treepo.cluster.ray_address import check_cluster, check_job_server, named_cluster
from treepo.errors import AllocationError, ClusterError


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "address",
    ["garbage", "h:0", "h:99999", "h:x", ":6379", "a b:6379", "ray://h:10001", "::1:6379", "h:1/x"],
)
def test_an_address_of_another_form_is_refused(address: str) -> None:
    for check in (check_cluster, check_job_server):
        with pytest.raises(AllocationError, match=f"^RAY_ADDRESS={address}: expected HOST:PORT"):
            check(address)


def test_a_job_server_s_address_is_for_launch_alone() -> None:
    with pytest.raises(AllocationError, match="`treepo launch` alone can use; expected the HOST:PORT"):
        check_cluster("http://127.0.0.1:8265")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "localhost:{}", "[::1]:{}"])
def test_a_port_without_a_cluster_is_one_line(unused: int, address: str) -> None:
    assert_unanswered(lambda: check_cluster(address.format(unused)))
    assert_unanswered(lambda: check_job_server(address.format(unused)))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{}", "https://localhost:{}", "http://", "http://[", "http://h:x"]
)
def test_a_url_without_a_job_server_is_one_line(unused: int, url: str) -> None:
    assert_unanswered(lambda: check_job_server(url.format(unused)))


def test_a_server_that_says_nothing_is_not_waited_for(silent: int) -> None:
    assert_unanswered(lambda: check_cluster(f"127.0.0.1:{silent}"))
    assert_unanswered(lambda: check_job_server(f"http://127.0.0.1:{silent}"))


def assert_unanswered(check) -> None:
    with pytest.raises(ClusterError) as error:
        check()
    assert "answers" in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_without_a_cluster_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_address: str, _folder: None) -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray_address.services, "get_ray_address_from_environment", none)
    with pytest.raises(ClusterError, match="RAY_ADDRESS=auto: no Ray cluster runs on this machine"):
        check_cluster("auto")


@pytest.mark.parametrize(("value", "named"), [("", None), (" ", None), ("local", None), ("h:1", "h:1")])
def test_an_empty_value_and_local_name_no_cluster(
    monkeypatch: pytest.MonkeyPatch, value: str, named: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert named_cluster() == named
    found = find_allocation({"RAY_ADDRESS": value}, Flags())
    assert getattr(found, "address", None) == named
