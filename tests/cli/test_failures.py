"""The error that ends a command: one line for each cause, and no cause hides another."""

import asyncio
import errno

import pytest

from treepo.cli.main import exit_code_of
from treepo.errors import CheckpointError, ConfigError, EngineError, one_line


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "run/trees.jsonl")


def lines(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    def command() -> None:
        raise error

    return exit_code_of(command), capsys.readouterr().err.splitlines()


def test_a_full_disk_does_not_hide_the_error_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        try:
            raise CheckpointError("step-00003 could not be written")
        finally:
            raise full()

    assert exit_code_of(command) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: step-00003 could not be written",
        "error: run/trees.jsonl: No space left on device",
    ]


def test_the_errors_of_many_tasks_are_shown_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    group = BaseExceptionGroup(
        "tasks",
        [
            EngineError("engine 0: gone"),
            BaseExceptionGroup("more", [EngineError("engine 0: gone"), full(), asyncio.CancelledError()]),
            ConfigError("out: wrong"),
        ],
    )
    code, shown = lines(group, capsys)
    assert code == 2
    assert shown == [
        "error: engine 0: gone",
        "error: run/trees.jsonl: No space left on device",
        "error: out: wrong",
    ]


def test_a_fault_of_ours_beside_others_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExceptionGroup):
        lines(ExceptionGroup("tasks", [EngineError("engine 0: gone"), KeyError("a bug")]), capsys)
    assert capsys.readouterr().err.splitlines() == ["error: engine 0: gone"]


def test_another_library_s_colors_and_lines_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\x1b[36mray::f()\x1b[39m (pid=1)\n\x1b[1m  failed"
    assert one_line(text) == "ray::f() (pid=1) failed"
    assert lines(EngineError(one_line(text)), capsys) == (1, ["error: ray::f() (pid=1) failed"])
