"""`treepo eval` as a user runs it: a real engine, a kill, and the same command again."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support.tiny import write_tiny_qwen2
from treepo.toy.byte_tokenizer import byte_tokenizer
from treepo.toy.problems import draw_problems, rows
from treepo.tree import from_json

PROBLEMS, SAMPLES = 120, 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer, and enough problems for a kill in between."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = byte_tokenizer(max_tokens=1024).hugging_face
    write_tiny_qwen2(
        folder / "model",
        vocab_size=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder / "model")
    with (folder / "sums.jsonl").open("w") as file:
        for row in rows(draw_problems(np.random.default_rng(0), PROBLEMS), "test"):
            file.write(json.dumps(row) + "\n")
    return folder


def _start(folder: Path) -> subprocess.Popen[str]:
    options = f"--model model --data sums.jsonl --samples {SAMPLES} --max-tokens 24 --max-prompt-tokens 256"
    settings = "model.dtype=float32 reward.workers=1 engine.max_total_tokens=8000 sampling.max_live_trees=6"
    return subprocess.Popen(
        [
            *(sys.executable, "-c", "from treepo.cli.main import main; main()", "eval"),
            *(*options.split(), "--out", "out"),
            *settings.split(),
        ],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_same_command_goes_on_after_a_kill_without_repeating_a_problem(folder: Path) -> None:
    process = _start(folder)
    trees = folder / "out" / "trees.jsonl"
    deadline = time.monotonic() + 300
    while not (trees.exists() and trees.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no problem was finished"
        time.sleep(0.05)
    descendants = psutil.Process(process.pid).children(recursive=True)
    engines = [child for child in descendants if "sglang" in child.name().lower()]
    assert engines
    process.kill()
    process.communicate()
    # The processes that hold the model's memory must have ended; Ray's agents may take a while.
    _, alive = psutil.wait_procs(engines, timeout=300)
    assert not alive
    finished = [line for line in trees.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 3 <= len(finished) < PROBLEMS

    process = _start(folder)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"{len(finished)} of {PROBLEMS} problems were finished before" in output
    assert "\x1b" not in output, "plain lines outside a terminal"
    lines = trees.read_bytes().splitlines(keepends=True)
    assert lines[: len(finished)] == finished
    names = [f"sums:{index}" for index in range(PROBLEMS)]
    assert sorted(from_json(line).prompt_id for line in lines) == sorted(names)
    samples = [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()]
    assert Counter(sample["problem"] for sample in samples) == dict.fromkeys(names, SAMPLES)

    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["cost"]["sessions"] == 2
    assert results["failures"] == {}
    assert results["overall"]["finished"] == PROBLEMS
    assert sum(results["overall"]["verdicts"].values()) == PROBLEMS * SAMPLES
    decoded = sum(from_json(line).unique_tokens() for line in lines)
    assert results["overall"]["tokens"]["unique"] == decoded
    assert (folder / "out" / "report.html").read_text().startswith("<!doctype html>")

    again = _start(folder)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "start engine" not in output
    assert trees.read_bytes().splitlines(keepends=True) == lines
    assert json.loads((folder / "out" / "results.json").read_text()) == results
