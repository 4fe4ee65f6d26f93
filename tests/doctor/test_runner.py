"""`treepo doctor` runs checks that pass, fail, crash, hang and litter, and reports each of them."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from tests.support.command import heed_interrupts
from tests.support.paths import ROOT
from treepo.cli.main import app
from treepo.doctor import checklist
from treepo.doctor.check import Check, Status
from treepo.doctor.checklist import CHECKS, select_checks
from treepo.doctor.runner import kill_with_descendants, run_check
from treepo.errors import ConfigError

SECONDS = 120  # more than any check here takes


def check(name: str, deadline: float = SECONDS, slow: bool = False) -> Check:
    return Check(name, f"tests.support.doctor_checks:{name}", deadline, "what to do", slow)


@pytest.fixture(autouse=True)
def _fake_checks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


# Checks and the processes that run them


def test_every_check_has_a_function_and_a_name_of_its_own() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for one in CHECKS:
        module, name = one.function.split(":")
        function = getattr(import_module(module), name)
        assert not inspect.signature(function).parameters
        assert one.deadline > 0
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
    result = run_check(check(name))
    if name == "dies":  # the process that it started is killed too
        child = int((tmp_path / "pid").read_text())
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert result.outcome.status is status
    assert found in result.outcome.found
    assert result.outcome.remedy == remedy
    assert bool(result.output) == (name in ("crashes", "is_not_there"))


def test_what_a_crashed_check_printed_is_kept() -> None:
    assert "KeyError: 'a bug'" in run_check(check("crashes")).output[-1]


def test_a_check_that_hangs_fails_at_its_deadline() -> None:
    result = run_check(check("hangs", deadline=0.5))
    assert result.outcome.status is Status.FAIL
    assert result.outcome.found == "no answer within 0.5 s"


def test_checks_can_be_chosen() -> None:
    assert select_checks(None) == select_checks([]) == CHECKS
    assert [one.name for one in select_checks(["nccl", "devices"])] == ["nccl", "devices"]
    with pytest.raises(ConfigError, match="no check is named 'gpus'; there are python, "):
        select_checks(["gpus"])


def test_a_check_leaves_no_files() -> None:
    folder = run_check(check("litters")).outcome.found
    assert "treepo-doctor" in folder
    assert not Path(folder).exists()


def test_a_process_is_killed_with_what_it_started_and_nothing_else() -> None:
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
    kill_with_descendants(process)
    assert process.poll() is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert bystander.poll() is None
    bystander.communicate(b"\n")
    kill_with_descendants(process)  # a second call does nothing


# The command


@pytest.mark.parametrize(
    ("names", "code"),
    [(("good", "absent"), 0), (("good", "bad"), 1), (("crashes", "good"), 1), ((), 0)],
)
def test_exit_code_is_1_if_a_check_failed(
    names: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checklist, "CHECKS", tuple(map(check, names)))
    result = run()
    assert result.exit_code == code
    for name in names:
        assert name in result.stdout  # a failed check does not stop the others


def test_a_line_says_what_was_found_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checklist, "CHECKS", (check("bad"),))
    lines = run().stdout.splitlines()
    assert lines[0].split() == ["fail", "bad", "not", "[there]"]
    assert lines[1].split() == ["→", "put", "it", "there"]
    assert "0 passed, 1 failed, 0 skipped" in lines[2]


def test_json_is_one_document_with_the_same_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checklist, "CHECKS", (check("good"), check("bad"), check("crashes"), check("absent")))
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
    monkeypatch.setattr(checklist, "CHECKS", (check("good"), check("crashes", slow=True)))
    result = run("--quick")
    assert result.exit_code == 0
    assert "--quick" in result.stdout


def test_an_interrupt_kills_the_check_that_runs(tmp_path: Path) -> None:
    program = (
        "from treepo.cli.main import main\n"
        "from treepo.doctor import checklist\n"
        "from treepo.doctor.check import Check\n"
        "checklist.CHECKS = (Check('hangs', 'tests.support.doctor_checks:hangs', 600, 'what to do'),)\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "doctor"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    )
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
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children
    assert not alive
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_doctor_of_this_machine() -> None:
    """Checks of this project pass; checks of the machine have an outcome."""
    command = [sys.executable, "-c", "from treepo.cli.main import main; main()", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    document = json.loads(result.stdout)
    outcomes = {entry["name"]: entry for entry in document["checks"]}
    assert list(outcomes) == [check.name for check in CHECKS]
    for name in ("python", "packages", "loopback", "gloo", "engine", "trainer", "routing"):
        assert outcomes[name]["status"] == "pass", outcomes[name]
    assert result.returncode == (1 if document["fail"] else 0)
    assert not any(entry["output"] for entry in document["checks"]), "a check crashed or hung"
