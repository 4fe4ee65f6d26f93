"""The death of Ray ends the body with one ClusterError, and what a dead raylet leaves is killed.

Processes stand in for Ray's: the watch sees only their ids.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace

import psutil
import pytest
import ray

from treepo.cluster import ray_watch
from treepo.cluster.ray_watch import keeping_signal_handlers, shut_down_ray, unless_lost, while_ray_lives
from treepo.errors import ClusterError

PARENT = """
import subprocess
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A GCS and a raylet that has started a worker; their clean-up is never cut short."""
    started = {
        name: subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
        for name in ("gcs_server", "raylet")
    }
    node = SimpleNamespace(
        all_processes={name: [SimpleNamespace(process=one)] for name, one in started.items()},
        kill_all_processes=lambda: None,
    )
    monkeypatch.setattr(ray._private.worker, "_global_node", node)  # type: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(ray_watch, "end_within", lambda *_: None)
    monkeypatch.setattr(ray_watch, "_died", False)
    yield started
    for one in started.values():
        for process in [*psutil.Process(one.pid).children(), one] if one.poll() is None else []:
            process.kill()
        one.wait()


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    assert process.stdout is not None
    return psutil.Process(int(process.stdout.readline()))


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def watched() -> None:
        async with while_ray_lives(None):
            await body()

    asyncio.run(watched())


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_death_ends_the_body_and_every_process_of_ray(processes, name: str) -> None:
    workers = [worker_of(one) for one in processes.values()]

    async def body() -> None:
        processes[name].kill()
        await asyncio.Event().wait()

    with pytest.raises(ClusterError) as raised:
        run(body)
    text = f"Ray's {name} (process {processes[name].pid}) was ended by SIGKILL, and no run goes on without it"
    assert str(raised.value) == text
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_no_call_of_a_dead_ray_is_waited_for(processes) -> None:
    async def body() -> None:
        processes["gcs_server"].kill()
        try:
            await asyncio.Event().wait()
        finally:  # as engines that end: Ray answers nothing any more
            with pytest.raises(ClusterError):
                await unless_lost(asyncio.Event().wait())

    with pytest.raises(ClusterError, match="gcs_server"):
        run(body)


def test_a_body_that_ends_already_is_not_cancelled_again(processes) -> None:
    ended = False

    async def body() -> None:
        nonlocal ended
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        try:
            await asyncio.Event().wait()
        finally:
            processes["raylet"].kill()
            await asyncio.to_thread(processes["raylet"].wait)
            await asyncio.sleep(0.5)
            ended = True

    with pytest.raises(ClusterError):
        run(body)
    assert ended


def test_a_body_without_a_death_is_left_alone(processes) -> None:
    async def body() -> None:
        assert await unless_lost(asyncio.sleep(0, "answer")) == "answer"

    run(body)
    assert all(one.poll() is None for one in processes.values())


def test_what_does_not_end_after_a_run_is_killed(processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a raylet that waits for a GCS that has ended before it."""
    workers = [worker_of(one) for one in processes.values()]
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_watch, "_LEAVE_SECONDS", 0.01)
    shut_down_ray()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert not any(psutil.pid_exists(one.pid) for one in processes.values())


@pytest.mark.usefixtures("processes")
def test_sigterm_has_its_handler_while_ray_ends_and_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: object) -> None: ...

    def drop_the_handler() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ray._private.worker._global_node.kill_all_processes()  # type: ignore[reportAttributeAccessIssue]

    seen: list[object] = []
    node = ray._private.worker._global_node  # type: ignore[reportAttributeAccessIssue]
    node.kill_all_processes = lambda: seen.append(signal.getsignal(signal.SIGTERM))
    monkeypatch.setattr(ray, "shutdown", drop_the_handler)
    monkeypatch.setattr(ray_watch, "_LEAVE_SECONDS", 0.01)
    before = signal.signal(signal.SIGTERM, own)
    try:
        shut_down_ray()
        assert [*seen, signal.getsignal(signal.SIGTERM)] == [own, own]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_dead_ray_is_not_waited_for_at_the_end(processes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        processes["gcs_server"].kill()
        await asyncio.Event().wait()

    skipped: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("it would wait"))
    monkeypatch.setattr(ray_watch, "skip_exit_handlers", lambda: skipped.append(True))
    with pytest.raises(ClusterError):
        run(body)
    shut_down_ray()
    assert skipped


def test_the_handler_of_sigterm_is_kept() -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with keeping_signal_handlers():
            ray._private.utils.set_sigterm_handler(signal.SIG_IGN)  # type: ignore[reportAttributeAccessIssue]
            assert signal.getsignal(signal.SIGTERM) is own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
