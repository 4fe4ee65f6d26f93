"""Runs stages in processes of their own, with a deadline for each stage.

A group's stages run one after another in one process, so that they can share what is slow to make (an engine,
imported libraries), until one fails: a new process takes the rest. At a deadline the process and everything
that it started is killed.

    python -m benchmarks.gpu.stage_process DESCRIPTOR SETTINGS STAGE ...

is the child's side. It writes JSON lines to the file descriptor: `{"deadline": seconds}` before it begins
something, and the result of each stage. Its output goes to a log.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from treepo.doctor.runner import kill_with_descendants
from treepo.errors import one_line

CLOSE_SECONDS = 20.0  # for a process to end what it started
DRY_PATIENCE = 10.0  # on deadlines: a dry run may share its few cores with other work
_POLL_SECONDS = 0.1
_LOG_LINES, _ERROR_CHARACTERS = 5, 500
_PREPARE_SECONDS = 60.0

Figures = dict[str, Any]
"""JSON values. `headline` is what the stage's line shows."""


class SkippedError(Exception):
    """The stage does not apply to this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class Stage:
    """function: `module:name`, called with a Context, returns Figures. seconds: what it takes on an H200.
    deadline: the seconds after which it is killed. group: stages of one group share a process.
    """

    name: str
    function: str
    seconds: float
    deadline: float
    group: str


@dataclass(frozen=True, slots=True)
class Settings:
    """dry_run: tiny sizes on a CPU. out: folder for logs. scratch: folder for files, deleted at the end.
    end: `time.time()` by which all must be done. stretch: factor on the deadlines, and on the sizes of stages
    that have no natural end.
    """

    dry_run: bool
    out: Path
    scratch: Path
    end: float
    stretch: float
    attention_backend: str

    def left(self) -> float:
        return self.end - time.time()

    def deadline(self, seconds: float) -> float:
        """The latest end, in `time.time()`, of work that may take `seconds`."""
        patience = DRY_PATIENCE if self.dry_run else self.stretch
        return min(time.time() + patience * seconds, self.end)


@dataclass(frozen=True, slots=True)
class Result:
    """status: SKIP if the stage does not fit into the time or does not apply here. log: the output's end."""

    stage: str
    status: Literal["PASS", "FAIL", "SKIP"]
    headline: str
    seconds: float
    figures: Figures = field(default_factory=dict)
    log: Sequence[str] = ()


class Context:
    """What a stage gets: the settings, and things that the stages of one process share."""

    def __init__(self, settings: Settings, announce: Callable[[float], None]) -> None:
        self.settings = settings
        self.dry_run = settings.dry_run
        self._announce = announce
        self._shared: dict[str, tuple[Any, ExitStack]] = {}

    def shared[T](self, name: str, make: Callable[[], AbstractContextManager[T]]) -> T:
        """The thing of this name. It is made at its first use, within a deadline of its own, and kept for the
        next stages until `close`.
        """
        if name not in self._shared:
            self._announce(_PREPARE_SECONDS)
            stack = ExitStack()
            self._shared[name] = stack.enter_context(make()), stack
        return self._shared[name][0]

    def close(self, *names: str) -> None:
        """End what is shared under these names, or everything."""
        for name in names or [*self._shared]:
            if name in self._shared:
                self._shared.pop(name)[1].close()

    def folder(self, name: str) -> Path:
        """A folder for files, which is deleted when all stages have run."""
        folder = self.settings.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def run_group(stages: Sequence[Stage], settings: Settings) -> Iterator[Result]:
    """Run the stages of one group, in one process if none fails; yield their results in order."""
    waiting = list(stages)
    while waiting:
        if settings.left() < waiting[0].seconds:
            yield _does_not_fit(waiting.pop(0), settings)
            continue
        for result in _run_process(tuple(waiting), settings):
            waiting.pop(0)
            yield result


def _run_process(stages: Sequence[Stage], settings: Settings) -> Iterator[Result]:
    """Run stages in a new process until one fails, and yield the results so far: at least one."""
    log = settings.out / f"{stages[0].group}.log"
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with log.open("ab") as output, os.fdopen(reading, "rb", 0) as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(writing), _encoded(settings), *map(_encoded, stages)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *_python_path()])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,  # so that everything it starts can be killed with it
        )
        os.close(writing)
        try:
            yield from _results(process, messages, stages, settings, log)
        finally:
            kill_with_descendants(process)


def _python_path() -> list[str]:
    """Of this process. The stages' processes and theirs need the repository too, wherever they start."""
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


def _results(
    process: subprocess.Popen[bytes], messages: Any, stages: Sequence[Stage], settings: Settings, log: Path
) -> Iterator[Result]:
    unread = b""
    done = 0
    began = time.time()
    deadline = settings.deadline(_PREPARE_SECONDS)
    while done < len(stages):
        ended = process.poll() is not None  # before the last read, which then finds all that was written
        unread += messages.read() or b""
        *lines, unread = unread.split(b"\n")
        for line in map(json.loads, lines):
            if "deadline" in line:
                deadline = settings.deadline(line["deadline"])
                continue
            done += 1
            began = time.time()
            result = Result(**line)
            yield _with_log(result, log)
            if result.status == "FAIL":
                _wait(process)
                return
        if ended and not lines:
            reason = f"its process ended with exit code {process.returncode}"
            yield _with_log(_failed(stages[done], reason, began), log)
            return
        if time.time() > deadline:
            reason = f"killed at its deadline, after {time.time() - began:.0f} s"
            yield _with_log(_failed(stages[done], reason, began), log)
            return
        time.sleep(_POLL_SECONDS)
    _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):  # then the caller kills it
        process.wait(CLOSE_SECONDS)


def _failed(stage: Stage, reason: str, began: float) -> Result:
    return Result(stage.name, "FAIL", reason, time.time() - began)


def _does_not_fit(stage: Stage, settings: Settings) -> Result:
    reason = f"takes about {stage.seconds:.0f} s, and {max(settings.left(), 0):.0f} s are left"
    return Result(stage.name, "SKIP", reason, 0.0)


def _with_log(result: Result, log: Path) -> Result:
    if result.status != "FAIL":
        return result
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Result(**{**asdict(result), "log": lines[-_LOG_LINES:]})


def _encoded(what: Settings | Stage) -> str:
    return json.dumps(asdict(what), default=str)


def run_stages(stages: Sequence[Stage], settings: Settings, send: Callable[[dict[str, Any]], None]) -> bool:
    """The child's side: run the stages that fit, and send their results. Returns whether all passed."""

    def announce(seconds: float) -> None:
        send({"deadline": seconds})

    context = Context(settings, announce)
    try:
        for stage in stages:
            if settings.left() < stage.seconds:
                send(asdict(_does_not_fit(stage, settings)))
                continue
            announce(stage.deadline)
            result = _run_stage(stage, context)
            send(asdict(result))
            if result.status == "FAIL":
                return False
        return True
    finally:
        announce(CLOSE_SECONDS)
        context.close()


def _run_stage(stage: Stage, context: Context) -> Result:
    start = time.time()
    module, name = stage.function.split(":")
    try:
        figures: Figures = getattr(import_module(module), name)(context)
    except SkippedError as reason:
        return Result(stage.name, "SKIP", str(reason), time.time() - start)
    except Exception as error:  # of any kind: the other stages are to run
        traceback.print_exc()
        return Result(
            stage.name, "FAIL", one_line(f"{type(error).__name__}: {error}")[:500], time.time() - start
        )
    return Result(stage.name, "PASS", str(figures.pop("headline")), time.time() - start, figures)


def main() -> None:
    descriptor, settings, *stages = sys.argv[1:]
    os.set_inheritable(int(descriptor), False)
    loaded = json.loads(settings)

    def send(message: dict[str, Any]) -> None:
        os.write(int(descriptor), json.dumps(message).encode() + b"\n")

    passed = run_stages(
        [Stage(**json.loads(stage)) for stage in stages],
        Settings(**{**loaded, "out": Path(loaded["out"]), "scratch": Path(loaded["scratch"])}),
        send,
    )
    sys.stdout.flush()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    # The stages import this module by its name, and its classes must be the same here.
    import_module("benchmarks.gpu.stage_process").main()
