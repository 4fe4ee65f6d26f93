"""The reason of a failed start, taken from what the processes write to standard error."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch

from sglang_rollout.child_output import ChildOutput, explain
from treepo.config.engine import EngineConfig
from treepo.errors import EngineError

TRACEBACK = """\
[2026-11-27 16:00:00] a warning about libcuda.so
[2026-11-27 16:00:01 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "scheduler.py", line 1, in run_scheduler_process
    scheduler = Scheduler()
{error}
"""


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        ("ValueError: a strange model", "ValueError: a strange model", None),
        (
            "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried 2 GiB",
            "Tried 2 GiB",
            "engine.memory_fraction",
        ),
        (
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "Not enough memory",
            "raise engine.memory_fraction",
        ),
        (
            "RuntimeError: Could not find CUDA installation. Please set CUDA_HOME environment variable.",
            "Could not find CUDA installation",
            "no CUDA toolkit",
        ),
        ("    assert cuda_home is not None\nAssertionError", "AssertionError", "no CUDA toolkit"),
        (
            "RuntimeError: ninja exited with status 1\nstdout:\n/usr/bin/ld: cannot find -lcudart",
            "ninja exited with status 1",
            "no CUDA toolkit",
        ),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'ninja'", "'ninja'", "no CUDA toolkit"),
    ],
)
def test_an_exception_is_one_line_with_its_remedy(error: str, said: str, remedy: str | None) -> None:
    reason = explain(TRACEBACK.format(error=error).splitlines())
    assert said in reason
    assert "\n" not in reason
    assert (remedy is None) == ("(" not in reason)
    assert remedy is None or remedy in reason


def test_a_library_that_is_missing_before_python_starts_is_named() -> None:
    line = "python: error while loading shared libraries: libcudart.so.13: cannot open shared object file"
    assert explain([line]).startswith("SGLang's processes do not find the CUDA runtime")
    assert "libcudart.so.13" in explain([line])


def test_output_without_an_error_gives_no_reason() -> None:
    assert explain([]) == ""
    assert explain(["loading", "a warning: Error is a word"]) == ""


def test_output_is_passed_on_and_kept(capfd: pytest.CaptureFixture[str]) -> None:
    output = ChildOutput()
    with output.recorded():
        child = subprocess.Popen([sys.executable, "-c", "raise ValueError('the child failed')"])
    assert child.wait() == 1
    assert output.reason(60) == "ValueError: the child failed"
    sys.stderr.write("ours\n")
    written = capfd.readouterr().err
    assert "ValueError: the child failed\n" in written
    assert written.endswith("ours\n")


def fail() -> None:
    raise RuntimeError("Could not find CUDA installation. Please set CUDA_HOME environment variable.")


class FailingEngine:
    """As SGLang's: the parent learns the exit code of a child that failed, and has another that waits."""

    pids: ClassVar[list[int]] = []

    def __init__(self, **_arguments: object) -> None:
        spawn = multiprocessing.get_context("spawn")
        waiting = spawn.Process(target=signal.pause)
        waiting.start()
        assert waiting.pid is not None
        self.pids.append(waiting.pid)
        child = spawn.Process(target=fail)
        child.start()
        child.join()
        raise RuntimeError(f"Rank 0 scheduler died during initialization (exit code: {child.exitcode}).")


def test_a_start_that_fails_says_what_the_child_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_rollout.processes import SGLangProcesses

    module = SimpleNamespace(EngineWithoutDetokenizer=FailingEngine)
    monkeypatch.setitem(sys.modules, "sglang_rollout.without_detokenizer", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError) as error:
        SGLangProcesses(tmp_path, "float32", EngineConfig(), 0, shares_device=False, paths_at_once=None)
    said = str(error.value)
    assert said.startswith(f"SGLang does not start on {tmp_path}: SGLang compiles kernels and finds no")
    assert "(RuntimeError: Could not find CUDA installation. " in said
    assert not any(map(psutil.pid_exists, FailingEngine.pids))
