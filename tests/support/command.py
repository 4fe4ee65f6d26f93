"""Runs a `treepo` command as a user does, in a process of its own, and makes the files that it needs."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.support.paths import ROOT
from tests.support.tiny import write_tiny_qwen2
from treepo.toy.byte_tokenizer import byte_tokenizer
from treepo.toy.problems import draw_problems, rows

POSITIONS = 1024
DEADLINE = 300  # seconds: a busy machine takes minutes, a hang takes for ever


def write_model_and_problems(folder: Path, problems: Path, count: int) -> None:
    """Write `folder`/model, a random model with a byte tokenizer, and a file of problems."""
    tokenizer: Any = byte_tokenizer(max_tokens=POSITIONS).hugging_face
    model = write_tiny_qwen2(
        folder / "model",
        vocab_size=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=POSITIONS,
    )
    tokenizer.save_pretrained(model)
    with problems.open("w") as file:
        for row in rows(draw_problems(np.random.default_rng(0), count), "train"):
            file.write(json.dumps(row) + "\n")


def heed_interrupts() -> None:
    """Undo in a child, before it starts, that a shell's background jobs ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `treepo ARGUMENTS` in `folder`; its configuration can name modules of tests/."""
    return subprocess.Popen(
        [sys.executable, "-c", "from treepo.cli.main import main; main()", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def interrupt_once_written(
    process: subprocess.Popen[str], file: Path, number: signal.Signals = signal.SIGINT
) -> tuple[str, str]:
    """Send Ctrl-C or another signal as soon as `file` has content. The command must end with one line and
    leave no process. Returns standard output and standard error.
    """
    descendants = descendants_once_written(process, file)
    process.send_signal(number)
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    (line,) = errors.splitlines()
    assert line.startswith("Interrupted")
    _, alive = psutil.wait_procs(descendants, timeout=DEADLINE)
    assert not alive
    return output, errors


def kill_once_written(process: subprocess.Popen[str], file: Path) -> None:
    """Kill the command and every process that it started as soon as `file` has content."""
    descendants = descendants_once_written(process, file)
    for one in (process, *descendants):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate(timeout=DEADLINE)
    _, alive = psutil.wait_procs(descendants, timeout=DEADLINE)
    assert not alive


def descendants_once_written(process: subprocess.Popen[str], file: Path) -> list[psutil.Process]:
    """Wait until `file` has content; returns every process below the command."""
    deadline = time.monotonic() + DEADLINE
    while not (file.exists() and file.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing was written to {file}"
        time.sleep(0.5)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert descendants
    return descendants
