"""The real SGLang engine's processes: a death fails the running requests, and nothing is left behind."""

import asyncio
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.command import DEADLINE
from tests.support.paths import ROOT
from treepo.config.engine import EngineConfig
from treepo.errors import DeadEngineError, EngineError

pytestmark = pytest.mark.slow

START_IN_A_THREAD = """
import sys, threading
from pathlib import Path
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.errors import EngineError

def start():
    try:
        SGLangEngine(Path(sys.argv[1]), "float32", EngineConfig(), seed=0)
    except EngineError as error:
        print("raised:", error)

if __name__ == "__main__":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
"""


def living_children() -> set[int]:
    """The children of this process, without multiprocessing's tracker of shared memory, which stays."""
    children = psutil.Process().children(recursive=True)
    alive = (child for child in children if child.status() != psutil.STATUS_ZOMBIE)
    return {child.pid for child in alive if "resource_tracker" not in " ".join(child.cmdline())}


def test_a_death_fails_what_is_running_and_close_ends_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has taken the port that SGLang chose for its ranks: they need none."""
    from sglang.srt import server_args

    from tests.support.real_engine import manifest, request, start, write_model

    taken = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(server_args, "get_free_port", lambda: taken.getsockname()[1])
    stranger = multiprocessing.get_context("spawn").Process(target=signal.pause)
    stranger.start()
    before = living_children()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def scenario() -> None:
        real = start(write_model(tmp_path), asyncio.get_running_loop())
        try:
            started = living_children() - before
            assert started
            assert (await real.engine.generate(request([5, 6, 7]))).version == 0
            await real.engine.health_check()
            died = asyncio.ensure_future(real.engine.died())
            for child in started:
                psutil.Process(child).send_signal(
                    signal.SIGSTOP
                )  # so that nothing can be answered before the end
            running = [asyncio.ensure_future(real.engine.generate(request([5, 6]))) for _ in range(3)]
            with pytest.raises(TimeoutError):  # halted, not dead: nothing is answered
                await asyncio.wait_for(real.engine.health_check(), timeout=1)
            assert not died.done()
            for child in started:
                psutil.Process(child).send_signal(signal.SIGKILL)
            for failed in await asyncio.wait_for(
                asyncio.gather(*running, return_exceptions=True), timeout=300
            ):
                assert isinstance(failed, DeadEngineError)
                assert "ended" in str(failed)
            assert "ended" in await died
            with pytest.raises(DeadEngineError, match="ended"):
                await real.engine.health_check()
            with pytest.raises(EngineError, match="ended"):
                await real.engine.generate(request([5, 6]))
            with pytest.raises(EngineError, match="ended"):
                await real.engine.begin(1, manifest(real.reference.state_dict()))
        finally:
            real.engine.close()
            real.engine.close()

    asyncio.run(scenario())
    assert living_children() == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    taken.close()
    stranger.terminate()
    stranger.join()


def test_a_start_that_fails_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    from sglang_rollout.engine import SGLangEngine
    from tests.support.real_engine import write_model

    before = living_children()
    folder = write_model(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "NoSuchModel"))
    with pytest.raises(EngineError, match="does not start"):
        SGLangEngine(folder, "float32", EngineConfig.model_validate({}), seed=0)
    assert living_children() == before


def test_a_child_that_fails_does_not_end_the_process_that_starts_it_in_a_thread(tmp_path: Path) -> None:
    """As in an actor of Ray. SGLang's child sends SIGQUIT, and the error must name its exception."""
    from tests.support.real_engine import write_model

    config = write_model(tmp_path / "model") / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 128', '"vocab_size": 120'))
    script = tmp_path / "script.py"
    script.write_text(START_IN_A_THREAD)
    ran = subprocess.run(
        [sys.executable, script, tmp_path / "model"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"raised: SGLang does not start on .*model: .*(Error|Exception)", ran.stdout), ran.stdout
