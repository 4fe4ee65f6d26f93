"""What the checks of CUDA's compiler, linker and libraries say about good and bad machines."""

import os
from pathlib import Path

import pytest
import torch

from sglang_rollout import cuda_toolkit as toolkit
from treepo.doctor import cuda_toolkit
from treepo.doctor.check import Outcome, Status


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs, which is the whole PATH; no toolkit elsewhere."""
    monkeypatch.setattr(toolkit, "_SYSTEM_TOOLKIT", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def outcome_of(machine: Path, **environment: str) -> Outcome:
    return cuda_toolkit.try_toolkit({"PATH": str(machine / "bin"), **environment}, "sm_90", "13.0")


def test_a_machine_without_a_toolkit_fails(machine: Path) -> None:
    outcome = outcome_of(machine)
    assert outcome.status is Status.FAIL
    assert "no CUDA toolkit" in outcome.found
    assert "no bin/nvcc" in outcome_of(machine, CUDA_HOME=str(machine / "empty")).found


@pytest.mark.parametrize("missing", ["c++", "ninja"])
def test_each_program_is_needed(machine: Path, missing: str) -> None:
    for name in {"nvcc", "c++", "ninja"} - {missing}:
        program(machine / "bin" / name, "echo release 13.0")
    outcome = outcome_of(machine)
    assert outcome.status is Status.FAIL
    assert outcome.found.startswith(missing)


def test_a_compiler_of_another_cuda_fails(machine: Path) -> None:
    for name in ("nvcc", "c++", "ninja"):
        program(machine / "bin" / name, "echo Cuda compilation tools, release 12.4, V12.4.99")
    outcome = outcome_of(machine)
    assert outcome.status is Status.FAIL
    assert "CUDA 12.4, torch was built with CUDA 13.0" in outcome.found


def test_a_step_that_fails_is_named_with_its_last_line(machine: Path) -> None:
    program(machine / "bin" / "nvcc", "echo release 13.0")
    program(machine / "bin" / "ninja", "")
    program(machine / "bin" / "c++", "echo collecting >&2; echo cannot find -lcudart >&2; exit 1")
    outcome = outcome_of(machine)
    assert outcome.status is Status.FAIL
    assert outcome.found.endswith("a kernel does not link: cannot find -lcudart")


def test_a_library_that_does_not_load_fails(tmp_path: Path) -> None:
    library = tmp_path / "saver.so"
    assert cuda_toolkit.try_preload(library, os.environ).status is Status.FAIL
    library.write_text("no library")
    outcome = cuda_toolkit.try_preload(library, os.environ)
    assert outcome.status is Status.FAIL
    assert "saver.so does not load" in outcome.found


def test_a_machine_without_gpus_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_toolkit.cuda_toolkit().status is Status.SKIP
    assert cuda_toolkit.memory_saver().status is Status.SKIP


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_what_pip_installs_is_a_toolkit() -> None:
    """A kernel is compiled, linked and loaded with pip's packages and a C++ compiler alone."""
    programs = {"PATH": "/usr/bin:/bin"}
    if (Path("/usr/bin") / "nvcc").exists():
        pytest.skip("nvcc is in /usr/bin, where the C++ compiler is")
    variables = toolkit.cuda_variables(programs)
    assert "CUDA_HOME" in variables
    outcome = cuda_toolkit.try_toolkit(programs | variables, "sm_90", "13.0")
    assert outcome.status is Status.PASS, outcome.found
