"""`treepo rollout` as a user runs it."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.command import (
    DEADLINE,
    POSITIONS,
    descendants_once_written,
    interrupt_once_written,
    start,
    write_model_and_problems,
)
from treepo.config.load import load_as
from treepo.config.rollout import RolloutConfig
from treepo.errors import TreepoError
from treepo.preflight.inputs import read_rollout_inputs
from treepo.run_status import read_status
from treepo.tree import from_json

PROMPTS, WIDTH = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer, a few problems and a configuration."""
    folder = tmp_path_factory.mktemp("rollout")
    write_model_and_problems(folder, folder / "problems.jsonl", PROMPTS)
    config = {
        "out": "out",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"prompts": "problems.jsonl", "max_prompt_tokens": 256},
        "sampling": {"segment_tokens": 8, "max_depth": 4, "max_response_tokens": 32, "width": WIDTH},
        "engine": {"max_total_tokens": 8000},
    }
    (folder / "rollout.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=3", "override 'steps=3': steps: unknown key; allowed: out, seed,"),
        ("sampling.widht=3", "sampling.widht: unknown key; did you mean 'width'?"),
        ("model.path=nowhere", "nowhere: no such folder"),
        ("data.prompts=none.jsonl", "none.jsonl: no such file"),
        ("data.columns=gsm8k", "column 'question'"),
        ("data.max_prompt_tokens=9", "data.max_prompt_tokens allows 9"),
        ("data.max_prompt_tokens=1000", f"1000 + 32 = 1032, but model has {POSITIONS} positions"),
        ("data.max_prompt_tokens=987", f"{POSITIONS - 6} are allowed"),
        ("engine.max_total_tokens=290", "256 + 32 = 288, but engine.max_total_tokens = 290, of which"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(TreepoError) as error:
        read_rollout_inputs(load_as(RolloutConfig, Path("rollout.yaml"), [override]))
    assert message in str(error.value)


def test_a_damaged_model_is_found_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config = load_as(
        RolloutConfig,
        folder / "rollout.yaml",
        [f"model.path={model}", f"data.prompts={folder / 'problems.jsonl'}"],
    )
    with pytest.raises(TreepoError, match=r"model\.safetensors: not a readable safetensors file"):
        read_rollout_inputs(config)


def test_max_prompts_takes_the_first_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    inputs = read_rollout_inputs(load_as(RolloutConfig, Path("rollout.yaml"), ["max_prompts=3"]))
    assert [prompt.id for prompt in inputs.prompts] == ["problems:0", "problems:1", "problems:2"]


def test_other_files_in_the_folder_are_not_touched(folder: Path) -> None:
    process = start(folder, "rollout", "rollout.yaml", "out=.")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "out: . has files in it, but not of a run (config.yaml is missing)" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_every_prompt_gets_a_tree(folder: Path) -> None:
    process = start(folder, "rollout", "rollout.yaml")
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
    assert "\x1b" not in output, "plain lines outside a terminal"


@pytest.fixture(scope="module")
def many(folder: Path) -> str:
    """The override for more prompts than a test waits for."""
    (folder / "many.jsonl").write_text((folder / "problems.jsonl").read_text() * 1000)
    return "data.prompts=many.jsonl"


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_the_trees_so_far(folder: Path, many: str) -> None:
    process = start(folder, "rollout", "rollout.yaml", "out=interrupted", many)
    trees = folder / "interrupted" / "trees.jsonl"
    interrupt_once_written(process, trees)
    lines = trees.read_bytes().splitlines()
    assert 0 < len(lines) < 1000 * PROMPTS
    assert all(len(from_json(line).leaves) == WIDTH for line in lines)


@pytest.mark.slow
def test_the_death_of_ray_is_one_line_within_seconds(folder: Path, many: str) -> None:
    """Ray's own library would abort the command after a minute."""
    process = start(folder, "rollout", "rollout.yaml", "out=rayless", many)
    below = descendants_once_written(process, folder / "rayless" / "trees.jsonl")
    (gcs,) = (one for one in below if one.name() == "gcs_server")
    gcs.kill()
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    line = f"Ray's gcs_server (process {gcs.pid}) was ended by SIGKILL, and no run goes on without it"
    assert errors == f"error: {line}\n"
    assert line in (folder / "rayless" / "log.txt").read_text()
    assert read_status(folder / "rayless").reason == line
    _, alive = psutil.wait_procs(below, timeout=DEADLINE)
    assert not alive
