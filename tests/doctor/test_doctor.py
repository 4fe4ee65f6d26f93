"""`treepo doctor`: what checks say of hostile machines, and what becomes of checks that misbehave."""

import asyncio
import inspect
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from tests.support.paths import ROOT
from treepo.cli.main import app
from treepo.doctor import checks, devices, host, network, software
from treepo.doctor.checks import CHECKS, Check, chosen
from treepo.doctor.devices import Device
from treepo.doctor.engine import exercise
from treepo.doctor.examine import end_family, examine
from treepo.doctor.outcome import Status
from treepo.doctor.toy_model import Toy, difference
from treepo.errors import ConfigError, EngineError
from treepo.planning.hardware import control_group_room
from treepo.weight_sync.wire import Address, Bucket, Manifest, views

GIB = 1 << 30
SECONDS = 120  # no check here takes so long


def check(name: str, seconds: float = SECONDS, long: bool = False) -> Check:
    return Check(name, f"tests.support.doctor_checks:{name}", seconds, "what to do", long)


@pytest.fixture(autouse=True)
def _fake_checks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


# Checks and the processes that run them


def test_every_check_has_a_function_and_a_name_of_its_own() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for one in CHECKS:
        module, name = one.place.split(":")
        function = getattr(import_module(module), name)
        assert not inspect.signature(function).parameters
        assert one.seconds > 0
        assert one.remedy


@pytest.mark.parametrize(
    ("name", "status", "found", "remedy"),
    [
        ("good", Status.PASS, "there", ""),
        ("bad", Status.FAIL, "not [there]", "put it there"),
        ("absent", Status.SKIP, "nothing of the kind", ""),
        ("refuses", Status.FAIL, "it does not start", "what to do"),
        ("crashes", Status.FAIL, "exit code 1", "what to do"),
        ("dies", Status.FAIL, "SIGKILL", "what to do"),
        ("leaves", Status.FAIL, "exit code 0", "what to do"),
        ("is_not_there", Status.FAIL, "exit code 1", "what to do"),
    ],
)
def test_whatever_a_check_does_it_has_an_outcome(
    name: str, status: Status, found: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHILD_OF_DIES", str(tmp_path / "pid"))
    result = examine(check(name))
    if name == "dies":  # what it started does not outlive it
        child = int((tmp_path / "pid").read_text())
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert result.outcome.status is status
    assert found in result.outcome.found
    assert result.outcome.remedy == remedy
    assert bool(result.output) == (name in ("crashes", "is_not_there"))


def test_what_a_crashed_check_printed_is_kept() -> None:
    assert "KeyError: 'a bug'" in examine(check("crashes")).output[-1]


def test_a_check_that_hangs_fails_at_its_deadline() -> None:
    result = examine(check("hangs", seconds=0.5))
    assert result.outcome.status is Status.FAIL
    assert result.outcome.found == "no answer within 0.5 s"


def test_checks_can_be_chosen() -> None:
    assert chosen(None) == chosen([]) == CHECKS
    assert [one.name for one in chosen(["nccl", "devices"])] == ["nccl", "devices"]
    with pytest.raises(ConfigError, match="no check is named 'gpus'; there are python, "):
        chosen(["gpus"])


def test_a_check_leaves_no_files() -> None:
    folder = examine(check("litters")).outcome.found
    assert "treepo-doctor" in folder
    assert not Path(folder).exists()


def test_a_process_is_ended_with_what_it_started() -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        child = psutil.Process(int(process.stdout.readline()))
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    end_family(process)
    assert process.poll() is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert bystander.poll() is None
    bystander.communicate(b"\n")
    end_family(process)  # once more is nothing


# The command


@pytest.mark.parametrize(
    ("names", "code"),
    [(("good", "absent"), 0), (("good", "bad"), 1), (("crashes", "good"), 1), ((), 0)],
)
def test_exit_code_is_1_where_a_check_failed(
    names: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECKS", tuple(map(check, names)))
    result = run()
    assert result.exit_code == code
    for name in names:
        assert name in result.stdout  # the others run although one failed


def test_a_line_says_what_was_found_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (check("bad"),))
    lines = run().stdout.splitlines()
    assert lines[0].split() == ["fail", "bad", "not", "[there]"]
    assert lines[1].split() == ["→", "put", "it", "there"]
    assert "0 passed, 1 failed, 0 skipped" in lines[2]


def test_json_is_one_document_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (check("good"), check("bad"), check("crashes"), check("absent")))
    result = run("--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (document["pass"], document["fail"], document["skip"]) == (1, 2, 1)
    assert document["host"]
    assert document["version"]
    for entry in document["checks"]:
        assert set(entry) == {"name", "status", "found", "remedy", "seconds", "output"}
        assert (entry["status"] == "fail") == bool(entry["remedy"])
    assert [entry["status"] for entry in document["checks"]] == ["pass", "fail", "fail", "skip"]


def test_quick_leaves_out_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (check("good"), check("crashes", long=True)))
    result = run("--quick")
    assert result.exit_code == 0
    assert "--quick" in result.stdout


def test_an_interrupt_ends_the_check_that_runs(tmp_path: Path) -> None:
    program = (
        "from treepo.cli.main import main\n"
        "from treepo.doctor import checks\n"
        "checks.CHECKS = (checks.Check('hangs', 'doctor_checks:hangs', 600, 'what to do'),)\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "doctor"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + SECONDS
    while not any(log.read_text() for log in tmp_path.glob("*/output")):  # the check has begun
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert errors.startswith("Interrupted")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    assert not list(tmp_path.iterdir())


# What checks say


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
def test_packages_are_held_against_what_is_required(installed: dict[str, str], wrong: str) -> None:
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
def test_devices_need_code_of_their_generation(capability: tuple[int, int], good: bool) -> None:
    device = Device("a device", 16 * GIB, capability)
    outcome = devices.judge_devices([H100, device, H100], BUILT_FOR, "580.95.05")
    assert (outcome.status is Status.PASS) == good
    assert "2 x NVIDIA H100 (80 GiB, compute capability 9.0)" in outcome.found
    assert "1 x a device" in outcome.found


@pytest.mark.parametrize(
    ("served", "built", "good"),
    [((13, 0), "13.0", True), ((13, 0), "13.2", True), ((14, 1), "13.0", True), ((12, 9), "13.0", False),
     (None, "13.0", False), ((13, 0), None, False)],
)  # fmt: skip
def test_the_driver_must_serve_torchs_cuda(
    served: tuple[int, int] | None, built: str | None, good: bool
) -> None:
    outcome = devices.judge_driver(served, built, "570.1")
    assert (outcome.status is Status.PASS) == good
    assert bool(outcome.remedy) != good


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


def test_a_folder_that_cannot_be_written_is_said_and_no_failure() -> None:
    assert host.judge_disk(Path("/runs"), 0, False).status is Status.SKIP


def test_a_low_limit_of_open_files_is_seen_by_a_real_process(tmp_path: Path) -> None:
    answer = tmp_path / "outcome"
    command = (
        f"ulimit -n 256 && {sys.executable} -m treepo.doctor.child treepo.doctor.host:open_files {answer}"
    )
    subprocess.run(["bash", "-c", command], check=True)
    outcome = json.loads(answer.read_text())
    assert outcome["status"] == "fail"
    assert outcome["found"] == "256, at most 256, needs 8192"
    assert "nofile" in outcome["remedy"]


def test_loopback_and_own_addresses() -> None:
    assert network.loopback().status is Status.PASS
    assert network.is_own(socket.AF_INET, ("127.0.0.1", 0))
    assert not network.is_own(socket.AF_INET, ("192.0.2.1", 0))  # reserved for documentation: nobody has it
    assert not network.is_own(4711, ("127.0.0.1", 0))  # no such family


def test_an_address_that_others_cannot_reach_is_said() -> None:
    """A name that is this host's own, but on the loopback alone or beside a stranger."""
    loopback = network.judge_host_name("a", {"127.0.1.1": True})
    assert "others cannot reach it" in loopback.found
    assert "others" not in network.judge_host_name("a", {"10.0.0.1": True, "127.0.1.1": True}).found
    assert "10.9.9.9" in network.judge_host_name("a", {"10.9.9.9": False, "10.0.0.1": True}).found


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    for path, limit, used, inactive in (("job", "1000", "400", "100"), ("job/step", "max", "300", "0")):
        group = tmp_path / "fs" / path
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")
    assert control_group_room(tmp_path / "fs", membership) == [700]


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpuset:/\n3:memory,hugetlb:/docker/abc\n0::/\n")
    group = tmp_path / "fs" / "memory"  # a container sees its own group as the root
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000\n")
    (group / "memory.usage_in_bytes").write_text("1000\n")
    (group / "memory.stat").write_text("total_inactive_file 500\n")
    assert control_group_room(tmp_path / "fs", membership) == [4500]


def test_no_control_groups(tmp_path: Path) -> None:
    assert control_group_room(tmp_path, tmp_path / "none") == []


# The engine's check, on engines of every quality


class FakeEngine:
    """Computes with the toy's weights; takes the new ones where `takes` says so."""

    def __init__(self, toy: Toy, *, off: float = 0.0, takes: str = "all") -> None:
        self.version = 0
        self._toy, self._off, self._takes = toy, off, takes
        self._loaded: dict[str, Tensor] = {}
        self._receiver: Any = None

    async def generate(self, request: Any) -> Any:
        return SimpleNamespace(tokens=[0] * request.max_tokens, version=self.version)

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        return self._toy.log_probs(tokens, new=self.version == 1 and self._takes != "none") + self._off

    async def begin(self, version: int, manifest: Manifest) -> None:
        assert version == 1
        self._names = {info.name for info in manifest}

    async def join(self, address: Address) -> None:
        self._receiver = address.join(0, torch.device("cpu"))

    async def load(self, bucket: Bucket) -> None:
        if self._takes == "refuses":
            raise EngineError("a bucket is torn")
        flat = self._receiver.receive(bucket)
        self._loaded |= {name: tensor.clone() for name, tensor in views(flat, bucket.tensors)}

    async def commit(self) -> None:
        assert set(self._loaded) == self._names
        for name, tensor in self._toy.new_weights().items():
            assert tensor.equal(self._loaded[name])
        self.version = 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_an_update_change_log_probs_by_far_more_than_the_tolerance(
    dtype: str, tmp_path: Path
) -> None:
    toy = Toy(tmp_path, dtype)
    change = difference(toy.log_probs(toy.tokens), toy.log_probs(toy.tokens, new=True))
    assert change > 10 * toy.tolerance


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        ({}, ""),
        ({"off": 1e-3}, "log-probs differ"),
        ({"off": math.nan}, "log-probs differ"),
        ({"takes": "none"}, "after a weight update"),
        ({"takes": "refuses"}, "a bucket is torn"),
    ],
)
def test_an_engine_passes_where_it_computes_right_before_and_after_an_update(
    engine: dict[str, Any], found: str, toy: Toy
) -> None:
    outcome = asyncio.run(exercise(FakeEngine(toy, **engine), toy))  # type: ignore[arg-type]  # what it uses of one
    assert (outcome.status is Status.FAIL) == bool(found)
    assert found in outcome.found


# The whole command, for real


@pytest.mark.slow
def test_the_doctor_of_this_machine() -> None:
    """What depends on this project passes; what depends on the machine has an outcome."""
    command = [sys.executable, "-c", "from treepo.cli.main import main; main()", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    document = json.loads(result.stdout)
    outcomes = {entry["name"]: entry for entry in document["checks"]}
    assert list(outcomes) == [check.name for check in CHECKS]
    for name in ("python", "packages", "loopback", "gloo", "engine", "trainer"):
        assert outcomes[name]["status"] == "pass", outcomes[name]
    assert result.returncode == (1 if document["fail"] else 0)
    assert not any(entry["output"] for entry in document["checks"]), "a check crashed or hung"
