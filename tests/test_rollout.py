"""`treepo rollout` as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from tiny import write_tiny_qwen2

from treepo.config.load import load_as
from treepo.config.rollout import RolloutConfig
from treepo.errors import TreepoError
from treepo.orchestration.rollout_inputs import read_inputs
from treepo.toy.byte_tokenizer import byte_tokenizer
from treepo.toy.problems import draw_problems, rows
from treepo.tree import from_json

PROMPTS, WIDTH, POSITIONS = 12, 4, 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer, a few problems and a configuration."""
    folder = tmp_path_factory.mktemp("rollout")
    tokenizer = byte_tokenizer(max_tokens=POSITIONS).hugging_face
    model = write_tiny_qwen2(
        folder / "model",
        vocab_size=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=POSITIONS,
    )
    tokenizer.save_pretrained(model)
    with (folder / "problems.jsonl").open("w") as file:
        for row in rows(draw_problems(np.random.default_rng(0), PROMPTS), "test"):
            file.write(json.dumps(row) + "\n")
    config = {
        "out": "out",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "problems.jsonl", "max_prompt_tokens": 256},
        "sampling": {"segment_tokens": 8, "max_depth": 4, "max_response_tokens": 32, "width": WIDTH},
        "engine": {"max_total_tokens": 8000},
    }
    (folder / "rollout.yaml").write_text(yaml.safe_dump(config))
    return folder


def _start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from treepo.cli import main; main()", "rollout", "rollout.yaml", *overrides],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=3", "override 'steps=3': steps: unknown key; allowed: out, seed,"),
        ("sampling.widht=3", "sampling.widht: unknown key; did you mean 'width'?"),
        ("model.path=nowhere", "nowhere: no such folder"),
        ("data.train=none.jsonl", "none.jsonl: no such file"),
        ("data.columns=gsm8k", "column 'question'"),
        ("data.max_prompt_tokens=9", "data.max_prompt_tokens allows 9"),
        ("data.max_prompt_tokens=1000", f"1000 + 32 = 1032, but model has {POSITIONS} positions"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(TreepoError) as error:
        read_inputs(load_as(RolloutConfig, Path("rollout.yaml"), [override]))
    assert message in str(error.value)


def test_a_damaged_model_is_found_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config = load_as(
        RolloutConfig,
        folder / "rollout.yaml",
        [f"model.path={model}", f"data.train={folder / 'problems.jsonl'}"],
    )
    with pytest.raises(TreepoError, match=r"model\.safetensors: no readable safetensors file"):
        read_inputs(config)


def test_only_the_first_prompts_where_so_many_are_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    inputs = read_inputs(load_as(RolloutConfig, Path("rollout.yaml"), ["max_prompts=3"]))
    assert [prompt.id for prompt in inputs.prompts] == ["problems:0", "problems:1", "problems:2"]


def test_files_that_are_no_rollouts_are_not_touched(folder: Path) -> None:
    process = _start(folder, "out=.")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "out: . has files in it, but not of a run (config.yaml is missing)" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_every_prompt_gets_a_tree(folder: Path) -> None:
    process = _start(folder)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = (folder / "out" / "trees.jsonl").read_bytes().splitlines()
    trees = [from_json(line) for line in lines]
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    answers = {json.loads(line)["prompt_id"]: json.loads(line)["answer"] for line in lines}
    assert answers == {
        f"problems:{index}": problem["reward_model"]["ground_truth"] for index, problem in enumerate(problems)
    }
    assert len(trees) == PROMPTS
    assert all(len(tree.leaves) == WIDTH for tree in trees)

    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["trees"] == summary["prompts"] == PROMPTS
    assert summary["leaves"] == PROMPTS * WIDTH
    assert summary["failures"] == []
    assert summary["total_tokens"] == sum(tree.total_tokens() for tree in trees)
    assert summary["decoded_tokens"] >= sum(tree.unique_tokens() for tree in trees)
    assert summary["cached_token_ratio"] > 0.98
    assert f"{PROMPTS}/{PROMPTS} trees" in output
    assert "\x1b" not in output, "plain lines where the output is no terminal"


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_the_trees_so_far(folder: Path) -> None:
    rows = (folder / "problems.jsonl").read_text()
    (folder / "many.jsonl").write_text(rows * 1000)
    process = _start(folder, "out=interrupted", "data.train=many.jsonl")
    trees = folder / "interrupted" / "trees.jsonl"
    deadline = time.monotonic() + 300
    while not (trees.exists() and trees.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no tree was finished"
        time.sleep(0.5)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert descendants
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive
    lines = trees.read_bytes().splitlines()
    assert 0 < len(lines) < 1000 * PROMPTS
    assert all(len(from_json(line).leaves) == WIDTH for line in lines)
