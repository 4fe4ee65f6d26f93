"""The reason of a failed start, taken from what the processes write to standard error."""

import subprocess
import sys

import pytest

from sglang_rollout.child_output import ChildOutput, explain

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
