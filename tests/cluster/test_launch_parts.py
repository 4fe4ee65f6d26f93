"""Parts of a launch without a cluster: Ray that ends early, interrupts, the command, secrets."""

import asyncio
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from treepo.cluster.launch_parts import Launch, first_of, unless_ended
from treepo.cluster.ray_node import NodeResources, RayNode, last_lines, new_secrets
from treepo.config.load import load_config
from treepo.errors import ClusterError


class FakeNode(RayNode):
    """Ray on a node; it runs until `end` is set."""

    def __init__(self) -> None:
        self.end = asyncio.Event()

    async def ended(self) -> str:
        await self.end.wait()
        return "it ended"


def order(*arguments: str, width: int = 8, resume: bool = False) -> Launch:
    config = load_config(ROOT / "examples/quickstart.yaml", [f"sampling.width={width}"])
    return Launch(
        config,
        arguments,
        resume,
        check=lambda: None,
        wait=1.0,
        max_restarts=3,
        resources=NodeResources(),
        dashboard_port=None,
        interrupted=lambda: 143,
        say=lambda _: None,
        write=lambda _: None,
    )


def test_the_work_s_result_or_error_is_returned_while_ray_runs() -> None:
    async def scenario() -> None:
        assert await unless_ended(FakeNode(), asyncio.sleep(0, 7)) == 7
        with pytest.raises(ZeroDivisionError):
            await unless_ended(FakeNode(), asyncio.to_thread(lambda: 1 // 0))

    asyncio.run(scenario())


def test_the_work_is_cleaned_up_when_ray_ends() -> None:
    async def scenario() -> None:
        node, cleaned = FakeNode(), asyncio.Event()

        async def work() -> None:
            try:
                node.end.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.set()

        with pytest.raises(ClusterError, match="Ray on this node: it ended"):
            await unless_ended(node, work())
        assert cleaned.is_set()

    asyncio.run(scenario())


@pytest.mark.parametrize("comes", ["the news", "the end of Ray"])
def test_a_node_waits_for_the_head_or_for_its_own_ray(comes: str) -> None:
    async def scenario() -> None:
        node, news = FakeNode(), asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(first_of(news, node))
        await asyncio.sleep(0)
        assert not waiting.done()
        if comes == "the news":
            news.set_result(0)
        else:
            node.end.set()
        assert await waiting == (None if comes == "the news" else "it ended")

    asyncio.run(scenario())


def test_an_interrupted_node_waits_for_the_head_to_end() -> None:
    async def scenario() -> None:
        news = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(first_of(news, FakeNode()))
        await asyncio.sleep(0)
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        news.set_result(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_an_interrupted_head_cleans_up_at_once() -> None:
    async def scenario() -> None:
        begun, cleaned = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()

        task = asyncio.create_task(unless_ended(FakeNode(), work()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned.is_set()

    asyncio.run(scenario())


def test_equal_launches_have_equal_fingerprints() -> None:
    """A head that is started again with --resume is of the same launch."""
    one = order("run.yaml").fingerprint()
    assert one == order("run.yaml").fingerprint() == order("run.yaml", resume=True).fingerprint()
    assert (
        len({one, order("run.yaml", "steps=3").fingerprint(), order("run.yaml", width=4).fingerprint()}) == 3
    )


def test_the_command_survives_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder's"
    folder.mkdir()
    monkeypatch.chdir(folder)
    awkward = ("run file.yaml", "data.columns.answer_after=#### ", "out='x'$HOME;")
    command = order(*awkward).command(resume=False)
    change, _, program = command.partition(" && exec ")
    assert subprocess.check_output(["sh", "-c", f"{change}; pwd"], text=True).strip() == str(folder)
    assert shlex.split(program)[-4:] == ["train", *awkward]
    assert order(*awkward).command(resume=True) == f"{command} --resume"


@pytest.mark.parametrize("threads", [None, "6"])
def test_the_job_has_the_users_threads_and_not_those_of_rays_supervisor(
    threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    change, _, _ = order("run.yaml").command(resume=True).rpartition(" && exec ")
    supervisor = os.environ | {"OMP_NUM_THREADS": "1"}
    shown = subprocess.check_output(
        ["sh", "-c", f"{change}; echo $OMP_NUM_THREADS"], text=True, env=supervisor
    )
    assert shown.strip() == (threads or "")


def test_a_launch_has_a_token_of_its_own_unless_the_user_sets_one() -> None:
    first, second = new_secrets({}), new_secrets({"HOME": "/root"})
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    theirs = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/shared/token"}
    assert new_secrets(os.environ | theirs).items() >= theirs.items()
    assert new_secrets({"RAY_AUTH_MODE": "disabled"}) == {"RAY_AUTH_MODE": "disabled"}


def test_ray_s_output_is_shown_without_its_stacks() -> None:
    output = """
[2026-11-28 04:22:55 C] raylet.cc:9: Check failed: dead to the cluster
*** StackTrace Information ***
ray/raylet(+0x263cb7) [0x564782483cb7]
2026-11-28 04:22:55,439 ERR scripts.py:128 -- ----- END raylet.out tail (exit code(s)=1) -----
2026-11-28 04:22:55,440 ERR scripts.py:1315 -- Remaining processes will be killed.
"""
    assert last_lines(output) == "[2026-11-28 04:22:55 C] raylet.cc:9: Check failed: dead to the cluster"
