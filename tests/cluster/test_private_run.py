"""A real run on one machine: who can reach it, what it writes where, and what is left of it after SIGKILL."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.command import DEADLINE, descendants_once_written, start, write_model_and_problems
from tests.support.listening_sockets import Listening, listening
from tests.support.paths import ROOT
from treepo.data.temporary_folder import remove_abandoned

pytestmark = pytest.mark.slow

SHARED_MEMORY = Path("/dev/shm")
OVERRIDES = (
    *("model.path=model", "data.train=train.jsonl", "data.heldout=null", "data.max_prompt_tokens=224"),
    *("data.prompts_per_step=2", "steps=1000", "out=run", "checkpoint.every=1"),
)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path, because the sockets below it may have paths of at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="tp", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_nobody_gets_in_and_nothing_is_left(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {name: secrets.token_hex(32) for name in ("RAY_AUTH_TOKEN", "HF_TOKEN")}
    for name, value in {"TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary), **tokens}.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    write_model_and_problems(tmp_path, tmp_path / "train.jsonl", count=8)
    process = start(tmp_path, "train", str(ROOT / "examples/quickstart.yaml"), *OVERRIDES)
    processes = [psutil.Process(process.pid)]
    try:
        processes += descendants_once_written(process, tmp_path / "run" / "metrics.jsonl")
        sockets = list(listening(processes))
        names = {folder.name for folder in temporary.rglob("treepo-*")}
        _check_reached_by_nobody(sockets)
        assert len(names) == 2, "the run's folder, and the engine's in it"
        assert any(name in file.name for file in SHARED_MEMORY.iterdir() for name in names)
        assert _who_knows(list(tokens.values()), [tmp_path / "run", temporary], processes) == []
    finally:
        process.kill()
        output, errors = process.communicate(timeout=DEADLINE)
        _, alive = psutil.wait_procs(processes, timeout=DEADLINE)
    assert not alive
    assert not [word for word in tokens.values() if word in output + errors]
    remove_abandoned(temporary)  # as the next start does
    assert list(temporary.iterdir()) == []
    assert not [file for file in SHARED_MEMORY.iterdir() for name in names if name in file.name]


def _check_reached_by_nobody(sockets: list[Listening]) -> None:
    assert [socket for socket in sockets if not socket.is_local] == []
    programs = " ".join(socket.program for socket in sockets)
    for program in ("gcs_server", "raylet", "HostedEngine", "TrainerRank", "sglang::scheduler"):
        assert program in programs
    assert {socket.kind for socket in sockets} == {"tcp", "unix"}


def _who_knows(words: list[str], folders: list[Path], processes: list[psutil.Process]) -> list[str]:
    """The files and the command lines that have one of the words."""
    files = [Path(above, name) for folder in folders for above, _, names in os.walk(folder) for name in names]
    found = [
        str(file)
        for file in files
        if file.is_file() and any(word.encode() in file.read_bytes() for word in words)
    ]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            found += [line for word in words if word in line]
    return found
