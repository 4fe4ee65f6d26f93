"""The checkers of benchmarks/chaos find what they are there for, and its draws cover every fault."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.chaos import drill, invariants, roles, sandbox
from benchmarks.chaos.faults import PHASES, PROCESSES, TRANSPORTS, Fault, Signal, check_ends, draw
from benchmarks.chaos.scene import ROOT

PASSED = [f"p:{number}" for number in range(6)]
SOUND = [(1, "p:0"), (1, "p:1"), (2, "p:2"), (2, "p:3"), (3, "p:4"), (3, "p:5")]


def history(records: list[tuple[int, str]]) -> invariants.History:
    return invariants.check_trees(records, PASSED, steps=3, batch=2)


def test_a_sound_history_has_no_faults() -> None:
    assert history(SOUND) == invariants.History()


def test_a_lost_tree_is_found() -> None:
    found = history(SOUND[:-1])
    assert (found.lost, found.doubled) == (1, 0)
    assert found.faults == ["step 3 has 1 trees instead of 2"]


def test_a_doubled_tree_is_found() -> None:
    found = history([*SOUND, (3, "p:4")])
    assert (found.lost, found.doubled) == (0, 1)
    assert found.faults == ["step 3 has 3 trees instead of 2"]


def test_a_tree_in_the_place_of_another_is_lost_and_doubled() -> None:
    found = history([*SOUND[:-1], (3, "p:4")])
    assert (found.lost, found.doubled, found.faults) == (1, 1, [])


def test_a_tree_of_a_step_beyond_the_run_is_found() -> None:
    assert history([*SOUND[:-1], (4, "p:5")]).faults[-1] == "trees of steps that the run does not have: [4]"


def metrics(*steps: int) -> list[dict[str, object]]:
    return [{"step": step, "seconds/step": 1.0, "train/loss": 0.1} for step in steps]


def test_metrics_are_contiguous() -> None:
    evaluation = {"step": 1, "heldout/accuracy": 0.5}
    assert invariants.check_metrics([*metrics(1), evaluation, *metrics(2, 3)], 3) == []
    for steps in ((1, 3), (1, 2), (1, 2, 2, 3), (2, 1, 3), ()):
        assert len(invariants.check_metrics(metrics(*steps), 3)) == 1, steps


def test_a_loss_that_is_not_finite_is_found() -> None:
    lines = metrics(1, 2)
    lines[1]["train/loss"] = None
    assert invariants.check_metrics(lines, 2) == ["step 2: train/loss is None"]


def write_weights(run: Path, **tensors: torch.Tensor) -> Path:
    (run / "checkpoint").mkdir(parents=True)
    save_file(tensors, run / invariants.MODEL)
    return run


def test_weights_that_differ_in_one_bit_are_found(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    other = one.clone()
    other.view(torch.int32)[2] += 1
    same, changed, reference = (
        write_weights(tmp_path / name, a=tensor) for name, tensor in (("s", one), ("c", other), ("r", one))
    )
    assert invariants.check_weights(same, tmp_path, reference) == []
    (line,) = invariants.check_weights(changed, tmp_path, reference)
    assert line.startswith("1 of 1 tensors differ")


def test_weights_that_are_not_finite_or_learned_nothing_are_found(tmp_path: Path) -> None:
    start = write_weights(tmp_path / "start", a=torch.ones(2), b=torch.ones(2)) / "checkpoint"
    run = write_weights(tmp_path / "run", a=torch.ones(2), b=torch.tensor([1.0, float("nan")]))
    assert invariants.check_weights(run, start, None) == ["b is not finite", "a has not changed"]


def test_unfinished_files_are_found(tmp_path: Path) -> None:
    for name in (
        "summary.json",
        "summary.json.part",
        "checkpoints/step-00001/x",
        "checkpoints/.step-00002.x/y",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert invariants.unfinished_files(tmp_path) == ["checkpoints/.step-00002.x", "summary.json.part"]


def test_leftover_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, shared = tmp_path / "tmp", tmp_path / "shm"
    kept = temporary / "work" / "case"
    kept.mkdir(parents=True)
    shared.mkdir()
    monkeypatch.setattr(sandbox, "TEMPORARY", temporary)
    monkeypatch.setattr(sandbox, "SHARED_MEMORY", shared)
    assert sandbox.files(kept) == []
    (temporary / "ray").mkdir()
    (shared / "sem.x").touch()
    assert sandbox.files(kept) == [shared / "sem.x", temporary / "ray"]


def test_leftover_processes_and_sockets_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert f"127.0.0.1:{server.getsockname()[1]}" in sandbox.listening()
    sleep = [sys.executable, "-c", "input()"]
    with subprocess.Popen(sleep, stdin=subprocess.PIPE) as process:
        assert process.pid in {one.pid for one in sandbox.processes()}
        process.kill()
    assert process.pid not in {one.pid for one in sandbox.processes()}


def test_a_role_is_known_by_name_or_arguments() -> None:
    code = "'from treepo.cli.main import main; main()'; print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # before that it may have no command line yet
        found = psutil.Process(process.pid)
        assert roles.role_of(found) == "driver"
        assert roles.of_role("driver", [found]) == [found]
        assert roles.of_role("grader", [found]) == []
        process.kill()
    assert roles.role_of(found) is None


def test_draws_can_be_repeated_and_cover_everything() -> None:
    faults = [draw(7, case) for case in range(400)]
    assert faults[300] == draw(7, 300)
    assert faults[:50] != [draw(8, case) for case in range(50)]
    assert {fault.process for fault in faults} == set(PROCESSES)
    assert {fault.phase for fault in faults} == set(PHASES)
    assert {fault.transport for fault in faults} == set(TRANSPORTS)
    assert {fault.signal for fault in faults} == {"KILL", "STOP", "TERM", "FULL"}
    assert {fault.loop for fault in faults} == {"sync", "async"}


def ends_of(process: str, signal: Signal, phase: str, ends: list[int]) -> list[str]:
    return check_ends(Fault(process, signal, phase, "sync", "disk", 0.5), True, ends)


def test_an_end_that_should_not_have_been_is_found() -> None:
    assert ends_of("engine", "KILL", "sampling", [0]) == []
    assert ends_of("engine", "KILL", "start", [1, 0]) == []
    assert ends_of("trainer", "STOP", "training", [1, 0]) == ["the run did not go on by itself: exit code 1"]
    assert ends_of("driver", "KILL", "training", [-9, 0]) == []
    assert ends_of("driver", "TERM", "training", [143, 0]) == []
    assert ends_of("driver", "TERM", "training", [-6, 0]) == ["SIGTERM ended the run with exit code -6"]
    fault = Fault("driver", "KILL", "never", "sync", "disk", 0.0)
    assert check_ends(fault, False, [0]) == []
    assert check_ends(fault, False, [1, 0]) == ["without a fault the exit codes were [1, 0]"]


class FakeDrill:
    def __init__(self) -> None:
        self.at, self.lines = 0, list[str]()

    def step(self) -> int:
        return self.at

    def differences(self) -> list[str]:
        return self.lines


def test_a_kill_is_judged_by_the_next_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeDrill()
    waiting = [{"kill": 1, "at_step": 0}, {"kill": 2, "at_step": 0}]
    drill.judge(fake, waiting)  # type: ignore[reportArgumentType]
    assert len(waiting) == 2, "no checkpoint has been written since"
    fake.at, fake.lines = 1, ["a: 1 of 2 values differ"]
    waiting.append({"kill": 3, "at_step": 1})
    drill.judge(fake, waiting)  # type: ignore[reportArgumentType]
    assert waiting == [{"kill": 3, "at_step": 1}]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kill"], line["equal"]) for line in printed] == [(1, False), (2, False)]


def test_a_case_runs_in_namespaces_of_its_own() -> None:
    """Its processes, sockets and temporary files are all that it sees."""
    code = (
        "import os, sys; from pathlib import Path; from benchmarks.chaos import sandbox;"
        "sandbox.enter(Path(sys.argv[1]));"
        "print(os.getpid(), sandbox.processes(), sandbox.listening(), sandbox.files(Path(sys.argv[1])))"
    )
    command = sandbox.command([sys.executable, "-c", code, str(Path(__file__).parent)])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"this machine allows no namespaces: {done.stderr.strip()}")
    assert done.stdout.strip() == "1 [] [] []", done.stderr
