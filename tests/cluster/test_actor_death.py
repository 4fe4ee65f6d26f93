"""The reason of an actor's death: what is known and what its process wrote last, and no guess."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from tests.support.command import DEADLINE
from tests.support.paths import ROOT
from treepo.cluster import actor_death
from treepo.cluster.actor_death import death_without_lines, last_lines, own_last_lines

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: HostedEngine
\tpid: 8274
\tip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: {} Worker exit detail: {}"""
GUESSES = (
    " Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) "
    "ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another "
    "unexpected error."
)
END_OF_FILE = "Worker unexpectedly exits with a connection error code 2. End of file." + GUESSES


class DiedError(ActorDiedError):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def __str__(self) -> str:
        return self._text


@pytest.mark.parametrize(
    ("kind", "detail", "reason"),
    [
        ("SYSTEM_ERROR", END_OF_FILE, "its process 8274 on 10.0.0.7 ended"),
        (
            "SYSTEM_ERROR",
            "It exits with exit code 3.",
            "its process 8274 on 10.0.0.7 ended: It exits with exit",
        ),
        (
            "NODE_OUT_OF_MEMORY",
            "Task was killed",
            "8274 on 10.0.0.7 ended: Ray killed it because its machine ran",
        ),
    ],
)
def test_memory_is_named_only_if_ray_has_killed_for_it(kind: str, detail: str, reason: str) -> None:
    said = death_without_lines(DiedError(DIED.format(kind, detail)))
    assert reason in said
    assert "OOM" not in said
    assert "\n" not in said


def test_a_death_of_another_form_keeps_ray_s_words() -> None:
    said = death_without_lines(
        DiedError("The actor is dead because its node has died.\nNode Id: 12" + GUESSES)
    )
    assert said == "it died: The actor is dead because its node has died. Node Id: 12"


NATIVE = """:job_id:01000000
:actor_name:TrainerRank
loading
    @     0x7efc9a25a050  (unknown)  (unknown)
[2026-11-27 15:51:45,012 E 8275 8275] logging.cc:474: *** SIGSEGV received at time=1795794705 on cpu 0 ***
Fatal Python error: Segmentation fault

Stack (most recent call first):
  File "kernel.py", line 525 in launch
Extension modules: msgpack._cmsgpack (total: 17)
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it wrote nothing to standard error"),
        (":job_id:01000000\n\n", "it wrote nothing to standard error"),
        ("a\nb\nc\nd\ne\nf\n", "its last lines: b | c | d | e | f"),
        (
            NATIVE,
            'its last lines: Fatal Python error: Segmentation fault | File "kernel.py", line 525 in launch',
        ),
        ("  f(x)\n    ~^^^\nValueError: no\n  ^^\n", "its last lines: f(x) | ValueError: no ("),
        ("x" * 10_000_000, "its last lines: xxx"),
        (
            "torch.OutOfMemoryError: CUDA out of memory\n",
            "its last lines: torch.OutOfMemoryError: CUDA out of",
        ),
    ],
)
def test_the_last_lines_of_a_log_are_short(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "worker-ab-01000000-77.err").write_text(text)
    (tmp_path / "worker-ab-01000000-777.err").write_text("another process")
    line = last_lines(tmp_path, 77)
    assert line.startswith(said)
    assert len(line) < 1500
    assert "memory so far" not in line
    assert last_lines(tmp_path, 78) == "it has left no log"


@pytest.mark.parametrize("kills", [3, 5])
def test_the_kernel_is_named_only_if_it_has_killed_since_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    monkeypatch.setattr(actor_death, "kernel_kills", lambda: 3)
    actor_death.note_start()
    (tmp_path / "worker-ab-01000000-77.err").write_text(capsys.readouterr().err + "loading\n")
    monkeypatch.setattr(actor_death, "kernel_kills", lambda: kills)
    line = last_lines(tmp_path, 77)
    assert ("has killed 2 processes for memory" in line) == (kills == 5)
    assert line.startswith("its last lines: loading")


def test_a_child_s_end_is_named_by_signal_or_exit_code() -> None:
    killed = subprocess.Popen(["sleep", "1000"])
    killed.send_signal(signal.SIGKILL)
    ended, alive = subprocess.Popen(["false"]), subprocess.Popen(["sleep", "1000"])
    for child in (killed, ended):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    said = own_last_lines([killed.pid, ended.pid, alive.pid])
    assert said.startswith(
        f"process {killed.pid} was ended by SIGKILL; process {ended.pid} ended with exit code 1; "
    )
    assert str(alive.pid) not in said.split(" (")[0]
    alive.kill()
    for child in (killed, ended, alive):
        child.wait()


SCENARIO = """
import asyncio, os, sys
import ray
from ray.exceptions import RayActorError
from treepo.cluster.actor_death import death_of, note_start
from treepo.cluster.session import ray_session

class Actor:
    def __init__(self, dies):
        note_start()
        print("loading the weights", file=sys.stderr, flush=True)
        if dies:
            os.kill(os.getpid(), 9)
    def end(self):
        os._exit(7)

async def main():
    for dies in (True, False):
        try:
            await ray.remote(Actor).remote(dies).end.remote()
        except RayActorError as error:
            print(await death_of(error))

with ray_session(2):
    asyncio.run(main())
"""


@pytest.mark.slow
def test_real_actors_that_end_show_their_last_lines_and_ray_prints_no_guess() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCENARIO],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert "OOM" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    for line in lines:
        assert " ended; its last lines: loading the weights (" in line
