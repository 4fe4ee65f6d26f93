"""What the checks of software, devices, limits and network say about good and bad machines."""

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from treepo.doctor import devices, host, network, software
from treepo.doctor.check import Status
from treepo.doctor.devices import Device

GIB = 1 << 30


@pytest.mark.parametrize(
    ("version", "good"), [("3.12.0", True), ("3.12.11", True), ("3.11.9", False), ("3.13.0rc1", False)]
)
def test_python(version: str, good: bool) -> None:
    outcome = software.judge_python(version, ">=3.12,<3.13")
    assert (outcome.status is Status.PASS) == good
    assert version in outcome.found


REQUIREMENTS = [
    "torch==2.11.0",
    "ray[default]==2.60.0",
    "rich>=14",
    "numpy",
    "other==1; sys_platform == 'win32'",
    "pytest>=8; extra == 'dev'",
]


@pytest.mark.parametrize(
    ("installed", "wrong"),
    [
        ({"torch": "2.11.0", "ray": "2.60.0", "rich": "15.0", "numpy": "2"}, ""),
        ({"torch": "2.11.0+cu130", "ray": "2.60.0", "rich": "14.0.0rc1", "numpy": "2"}, "rich"),
        ({"torch": "2.11.0+cu130", "ray": "2.60.0", "rich": "14", "numpy": "3.0rc1"}, ""),
        (
            {"torch": "2.10.0", "ray": "2.60.0", "rich": "14", "numpy": "2"},
            "torch is 2.10.0 (needs ==2.11.0)",
        ),
        ({"torch": "2.11.0", "ray": "2.60.0.post1", "rich": "14", "numpy": "2"}, "ray is 2.60.0.post1"),
        ({"torch": "2.11.0", "ray": "2.60.0", "rich": "13.9.4", "numpy": "2"}, "rich is 13.9.4"),
        ({"torch": "2.11.0", "ray": "2.60.0", "rich": "14"}, "numpy is missing"),
    ],
)
def test_packages_are_compared_with_the_requirements(installed: dict[str, str], wrong: str) -> None:
    outcome = software.judge_packages(REQUIREMENTS, installed.get)
    assert (outcome.status is Status.FAIL) == bool(wrong)
    assert wrong in outcome.found
    if not wrong:
        assert outcome.found.startswith("torch 2.11.0")


H100 = Device("NVIDIA H100", 80 * GIB, (9, 0))
BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "good"),
    [((9, 0), True), ((8, 9), True), ((7, 0), False), ((6, 1), False), ((10, 3), True), ((11, 0), False),
     ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_torch_must_have_code_for_each_device(capability: tuple[int, int], good: bool) -> None:
    device = Device("a device", 16 * GIB, capability)
    outcome = devices.judge_devices([H100, device, H100], BUILT_FOR, "580.95.05")
    assert (outcome.status is Status.PASS) == good
    assert "2 x NVIDIA H100 (80 GiB, compute capability 9.0)" in outcome.found
    assert "1 x a device" in outcome.found


@pytest.mark.parametrize(
    ("supported", "built", "good"),
    [((13, 0), "13.0", True), ((13, 0), "13.2", True), ((14, 1), "13.0", True), ((12, 9), "13.0", False),
     (None, "13.0", False), ((13, 0), None, False)],
)  # fmt: skip
def test_the_driver_must_support_torchs_cuda(
    supported: tuple[int, int] | None, built: str | None, good: bool
) -> None:
    outcome = devices.judge_driver(supported, built, "570.1")
    assert (outcome.status is Status.PASS) == good
    assert bool(outcome.remedy) != good


def test_without_cuda_ipc_the_check_says_why_and_does_not_fail() -> None:
    assert devices.judge_ipc("ipc", ["by CUDA IPC"]).status is Status.PASS
    outcome = devices.judge_ipc("registered", ["through host memory: cudaErrorNotSupported"])
    assert outcome.status is Status.SKIP
    assert "cudaErrorNotSupported" in outcome.found
    assert outcome.remedy


@pytest.mark.parametrize(
    ("outcome", "good"),
    [
        (host.judge_shared_memory(64 << 20, 64 << 20), False),  # Docker's default
        (host.judge_shared_memory(16 * GIB, 16 * GIB), True),
        (host.judge_shared_memory(16 * GIB, 1 << 20), False),
        (host.judge_open_files(256, 256), False),
        (host.judge_open_files(1024, 1 << 20), True),
        (host.judge_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), True),
        (host.judge_locked_memory(8 << 20, ["mlx5_0"]), False),
        (host.judge_locked_memory(resource.RLIM_INFINITY, ["mlx5_0"]), True),
        (host.judge_memory(GIB, 512 * GIB), False),
        (host.judge_memory(100 * GIB, 512 * GIB), True),
        (host.judge_disk(Path("/runs"), 0, True), False),
        (host.judge_disk(Path("/runs"), 100 * GIB, True), True),
        (network.judge_host_name("a", {"10.0.0.1": True}), True),
        (network.judge_host_name("a", {"127.0.1.1": True, "fe80::1%eth0": False}), True),
        (network.judge_host_name("a", {"10.9.9.9": False, "10.0.0.1": True}), True),
        (network.judge_host_name("a", {"10.9.9.9": False}), False),
    ],
)
def test_limits_and_addresses(outcome: Any, good: bool) -> None:
    assert outcome.status is (Status.PASS if good else Status.FAIL)
    assert bool(outcome.remedy) != good


def test_a_folder_that_is_not_writable_is_skipped_not_failed() -> None:
    assert host.judge_disk(Path("/runs"), 0, False).status is Status.SKIP


def test_a_low_limit_of_open_files_fails_in_a_real_process(tmp_path: Path) -> None:
    answer = tmp_path / "outcome"
    command = (
        f"ulimit -n 256 && {sys.executable} -m treepo.doctor.runner treepo.doctor.host:open_files {answer}"
    )
    subprocess.run(["bash", "-c", command], check=True)
    outcome = json.loads(answer.read_text())
    assert outcome["status"] == "fail"
    assert outcome["found"] == "256, at most 256, needs 8192"
    assert "nofile" in outcome["remedy"]


def test_loopback_and_own_addresses() -> None:
    assert network.loopback().status is Status.PASS
    assert network.is_own_address(socket.AF_INET, ("127.0.0.1", 0))
    assert not network.is_own_address(
        socket.AF_INET, ("192.0.2.1", 0)
    )  # reserved for documentation, so no machine has it
    assert not network.is_own_address(4711, ("127.0.0.1", 0))  # no such family


def test_an_address_that_other_hosts_cannot_reach_is_reported() -> None:
    """The name resolves to this host, but only to its loopback, or to another host's address too."""
    loopback = network.judge_host_name("a", {"127.0.1.1": True})
    assert "others cannot reach it" in loopback.found
    assert "others" not in network.judge_host_name("a", {"10.0.0.1": True, "127.0.1.1": True}).found
    assert "10.9.9.9" in network.judge_host_name("a", {"10.9.9.9": False, "10.0.0.1": True}).found
