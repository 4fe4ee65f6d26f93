"""Finds the processes of a run by what they are."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

from benchmarks.chaos.sandbox import is_on_other_host

type _Test = Callable[[str, Sequence[str]], bool]


def _titled(title: str) -> _Test:
    return lambda _, arguments: bool(arguments) and arguments[0].startswith(title)


def _named(name: str) -> _Test:
    return lambda found, _: found == name


def _with(argument: str) -> _Test:
    return lambda _, arguments: any(argument in each for each in arguments)


_ROLES: dict[str, _Test] = {
    "engine": _titled("ray::HostedEngine"),
    "scheduler": _titled("sglang::"),
    "trainer": _titled("ray::TrainerRank"),
    "worker": _titled("ray::"),
    "grader": _with("treepo.rewards.keeper"),
    "raylet": _named("raylet"),
    "gcs": _named("gcs_server"),
    "driver": _with("from treepo.cli.main import main"),
}


def role_of(process: psutil.Process) -> str | None:
    """What a process is in a run; None if it has no role of its own, or is gone."""
    with suppress(psutil.Error):
        name, arguments = process.name(), process.cmdline()
        return next((role for role, test in _ROLES.items() if test(name, arguments)), None)
    return None


def of_role(role: str, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes of a role. A `worker` is any that Ray started from Python, engines and ranks included;
    a `node` is all of the other host.
    """
    if role == "everything":
        return list(processes)
    if role == "node":
        return [process for process in processes if is_on_other_host(process)]
    wanted = {"worker", "engine", "trainer"} if role == "worker" else {role}
    return [process for process in processes if role_of(process) in wanted]
