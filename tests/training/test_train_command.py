"""`treepo train` as a user runs it: real Ray, real SGLang, real Megatron-Core, in processes of their own."""

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.command import (
    DEADLINE,
    descendants_once_written,
    interrupt_once_written,
    kill_once_written,
    start,
    write_model_and_problems,
)
from treepo.run_status import read_status
from treepo.toy.make import make_toy
from treepo.toy.recipe import MIXTURE
from treepo.tree import from_json

STEPS = 3
UNTRAINED_MIXTURE = replace(
    MIXTURE,
    train_problems=1,
    heldout_problems=1,
    measured_samples=1,
    steps=2,
    careful_steps=1,
    warmup_steps=1,
    batch=1,
)
pytestmark = pytest.mark.slow


def reward_even_length(prompt: str, response: str, answer: str, extra: object) -> float:  # noqa: ARG001  the signature of every reward
    """A reward that a random model gets about half of the time."""
    return 1.0 if len(response) % 2 == 0 else -1.0


def reward_once_killed(prompt: str, response: str, answer: str, extra: object) -> float:
    """The same reward; after the second step, only once the test has killed the trainer."""
    run = Path("lost")
    while (run / "metrics.jsonl").read_bytes().count(b"\n") >= 2 and not (run / "killed").exists():
        time.sleep(0.1)
    return reward_even_length(prompt, response, answer, extra)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer, a few problems and a configuration."""
    folder = tmp_path_factory.mktemp("train")
    write_model_and_problems(folder, folder / "train.jsonl", count=12)
    config = {
        "out": "run",
        "steps": STEPS,
        "model": {"path": "model"},
        "data": {"train": "train.jsonl", "prompts_per_step": 4, "max_prompt_tokens": 224},
        "reward": {"workers": 1, "function": "tests.training.test_train_command:reward_even_length"},
        "sampling": {"segment_tokens": 8, "max_depth": 4, "max_response_tokens": 32, "width": 4},
        "learning": {"mini_batches": 2, "importance": {"mode": "none"}},
        "trainer": {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}, "max_tokens_per_pack": 256},
        "engine": {"max_total_tokens": 8000},
        "checkpoint": {"every": 1, "keep": None},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What a run that nothing disturbs prints."""
    process = start(folder, "train", "run.yaml")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def undisturbed(folder: Path, output: str) -> Path:
    """The folder of that run."""
    del output
    return folder / "run"


def test_three_steps_end_to_end(folder: Path, output: str, undisturbed: Path) -> None:
    run = undisturbed
    metrics = _lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    # Float32 on both sides; the same tokens through two implementations of two layers.
    assert all(line["logprob_difference_max"] < 1e-4 for line in metrics)
    assert all(line["rollout/cached_token_ratio"] > 0.98 for line in metrics)
    assert all(line["train/grad_norm"] > 0 for line in metrics)

    trees = [from_json(line) for line in (run / "trees.jsonl").read_bytes().splitlines()]
    assert len(trees) == STEPS * 4
    assert all(len(tree.leaves) == 4 for tree in trees)
    steps = [line["step"] for line in _lines(run / "trees.jsonl")]
    for tree, step in zip(trees, steps, strict=True):
        assert all((segment.versions == step - 1).all() for segment in tree.segments)

    summary = json.loads((run / "summary.json").read_text())
    assert summary["dtype"] == "float32", "auto, on CPUs"
    assert summary["accuracy_before"] is None
    # A shared segment and two below it for each of four prompts, compared as the steps' tokens are above.
    assert 4 * 3 <= summary["log_prob_check"]["tokens"] <= 4 * 3 * 8
    assert 0 < summary["log_prob_check"]["mean"] <= summary["log_prob_check"]["max"] < 1e-4
    assert "tokens: log-probs differ by" in (run / "log.txt").read_text()
    assert summary["sequential_tokens"] == sum(tree.total_tokens() for tree in trees)
    assert summary["max_logprob_difference"] == max(line["logprob_difference_max"] for line in metrics)
    assert "3/3" in output
    assert "\x1b" not in output, "plain lines outside a terminal"
    _assert_checkpoint_generates(run / "checkpoint", differs_from=folder / "model")


def test_a_mixture_trains_and_the_engine_gets_its_experts(folder: Path, tmp_path: Path) -> None:
    """The toy mixture, not trained yet; its trainer replays the engine's experts. In the second step the
    engine serves what the first one learned.
    """
    toy = make_toy(tmp_path, recipe=UNTRAINED_MIXTURE)
    overrides = (
        f"model.path={toy.model}",
        "out=mixture",
        "steps=2",
        "checkpoint.every=null",
        "trainer.routing_replay=rollout",
    )
    process = start(folder, "train", "run.yaml", *overrides)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    metrics = _lines(folder / "mixture" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["logprob_difference_max"] < 1e-4 for line in metrics)  # as above
    # In float32 the trainer's routers choose as the engine's did, but for experts that are equally good.
    assert all(line["routing/own_choice_differs"] < 0.01 for line in metrics)
    before, after = (
        load_file(model / "model.safetensors") for model in (toy.model, folder / "mixture" / "checkpoint")
    )
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name for name in before if "gate.weight" in name or "experts" in name} <= set(moved)


def _assert_checkpoint_generates(checkpoint: Path, differs_from: Path) -> None:
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    model, before = (Qwen2ForCausalLM.from_pretrained(path) for path in (checkpoint, differs_from))
    changed = [
        name
        for (name, after), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(after, old)
    ]
    assert changed == [name for name, _ in model.named_parameters()]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer("36 plus 7 = ?", return_tensors="pt")
    generator: Any = model  # transformers types `generate` for a class that no model satisfies
    generated = generator.generate(**tokens, max_new_tokens=4)
    assert generated.shape[1] > tokens["input_ids"].shape[1]


def test_a_killed_trainer_starts_again_beside_the_engines(folder: Path, undisturbed: Path) -> None:
    """It is killed while step 3 is sampled, when the checkpoint of step 2 is complete.

    The model is that of the undisturbed run, bit for bit: nothing that SGLang rounds as its batches happen to
    be composed is in the loss, because `importance.mode` is none.
    """
    waits = "reward.function=tests.training.test_train_command:reward_once_killed"
    process = start(folder, "train", "run.yaml", "out=lost", waits, f"reward.deadline_seconds={DEADLINE}")
    run = folder / "lost"
    started = descendants_once_written(process, run / "checkpoints" / "step-00002" / "checkpoint.json")
    engines = _named(started, "ray::HostedEngine", "sglang::")
    (rank,) = _named(started, "ray::TrainerRank")
    assert len(engines) >= 2
    rank.kill()
    (run / "killed").touch()
    alive: list[psutil.Process] = []
    deadline = time.monotonic() + DEADLINE
    while not (alive := _named(_descendants(process), "ray::TrainerRank")) or rank in alive:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert _named(_descendants(process), "ray::HostedEngine", "sglang::") == engines
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    (line,) = [line for line in (*output.splitlines(), *errors.splitlines()) if "the trainer lost" in line]
    assert "the trainer lost rank 0 (its process" in line
    assert line.endswith("the run goes on after step 2 (restart 1 of 3)")
    assert "is restarted" not in (run / "log.txt").read_text()
    assert [line["step"] for line in _lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert [line["trainer_restarts"] for line in _lines(run / "metrics.jsonl")] == [0, 0, 1]
    trees = [(each / "trees.jsonl").read_bytes().splitlines() for each in (undisturbed, run)]
    assert [_without_log_probs(line) for line in trees[0]] == [_without_log_probs(line) for line in trees[1]]
    ours, expected = (load_file(each / "checkpoint" / "model.safetensors") for each in (run, undisturbed))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _named(processes: list[psutil.Process], *names: str) -> list[psutil.Process]:
    """Those whose command line has one of the names, by process id."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if any(name in " ".join(process.cmdline()) for name in names):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def test_log_probs_that_differ_end_the_run_before_the_first_step(folder: Path) -> None:
    limits = [
        f"log_prob_check.{name}=1e-12" for name in ("mean_limit", "max_limit")
    ]  # rounding is above them
    process = start(folder, "train", "run.yaml", "out=stopped", *limits)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    (line,) = errors.splitlines()
    assert "disagree on the log-probs" in line
    assert "stale weights" in line
    assert not (folder / "stopped" / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def terminated(folder: Path) -> tuple[str, str]:
    """What a run prints, to standard output and to standard error, that SIGTERM ends after its first
    checkpoint. Its folder is `interrupted`.
    """
    process = start(
        folder, "train", "run.yaml", "out=interrupted", "steps=1000", "log_prob_check.enabled=false"
    )
    checkpoint = folder / "interrupted" / "checkpoints" / "step-00001" / "checkpoint.json"
    return interrupt_once_written(process, checkpoint, signal.SIGTERM)


def test_sigterm_leaves_no_process_and_readable_files(folder: Path, terminated: tuple[str, str]) -> None:
    output, errors = terminated
    assert "check log-probs" not in output
    assert "Interrupted by SIGTERM. " in errors
    assert "--resume continues after step" in errors
    log = (folder / "interrupted" / "log.txt").read_text().splitlines()
    assert log[-1].endswith("SIGTERM: the command ends")
    assert read_status(folder / "interrupted").state == "interrupted"
    assert _lines(folder / "interrupted" / "metrics.jsonl")[0]["step"] == 1
    for line in (folder / "interrupted" / "trees.jsonl").read_bytes().splitlines():
        from_json(line)


@pytest.mark.usefixtures("terminated")
def test_an_interrupted_run_goes_on_to_the_same_end(folder: Path, undisturbed: Path) -> None:
    """As after a kill in a later step: lines of steps without a checkpoint, one of them torn, and half a
    checkpoint. Trees, metrics and model equal those of the run that was not interrupted.
    """
    straight, interrupted = undisturbed, folder / "resumed"
    shutil.copytree(folder / "interrupted", interrupted)
    checkpoints = interrupted / "checkpoints"
    for entry in checkpoints.iterdir():
        if entry.name != "step-00001":
            shutil.rmtree(entry)
    shutil.copytree(checkpoints / "step-00001", checkpoints / ".step-00002.partial")
    for name in ("metrics.jsonl", "trees.jsonl"):
        with (interrupted / name).open("ab") as file:
            file.write((straight / name).read_bytes().splitlines()[-1][:100])

    process = start(folder, "train", "run.yaml", "--resume", "out=resumed", "checkpoint.keep=2")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "the run continues after step 1" in output
    assert "steps = 1000, now 3" in output
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["step-00002", "step-00003"]

    trees = [(run / "trees.jsonl").read_bytes().splitlines() for run in (straight, interrupted)]
    assert [_without_log_probs(line) for line in trees[0]] == [_without_log_probs(line) for line in trees[1]]
    for ours, expected in zip(
        _lines(interrupted / "metrics.jsonl"), _lines(straight / "metrics.jsonl"), strict=True
    ):
        assert ours["step"] == expected["step"]
        for key in ("reward", "train/loss", "train/grad_norm", "train/learning_rate"):
            # SGLang rounds log-probs as its batches happen to be composed: 1e-6, of which the loss sees some.
            assert ours[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    ours, expected = (load_file(run / "checkpoint" / "model.safetensors") for run in (interrupted, straight))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam divides by the gradient's size. If a gradient is nothing but rounding, its weight moves by up
        # to the learning rate, 1e-3, in a random direction.
        difference = (ours[name] - tensor).abs()
        assert difference.max() <= 2 * STEPS * 1e-3, name
        assert (difference > 1e-4).float().mean() < 1e-3, name
    ours, expected = (json.loads((run / "summary.json").read_text()) for run in (interrupted, straight))
    for key in ("steps", "decoded_tokens", "sequential_tokens"):
        assert ours[key] == expected[key], key


def test_an_asynchronous_run_that_is_killed_trains_every_prompt_once(folder: Path) -> None:
    """Two epochs of three steps. After the kill, trees that wait for a step are trained as they are, and
    those that were growing grow again.
    """
    split = ["placement=split", "loop.mode=async", "loop.max_staleness=2", "log_prob_check.enabled=false"]
    arguments = ["train", "run.yaml", "out=async", "steps=6", *split]
    run = folder / "async"
    process = start(folder, *arguments)
    kill_once_written(process, run / "checkpoints" / "step-00002" / "checkpoint.json")

    process = start(folder, *arguments, "--resume")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "engines idle" in output
    assert [line["step"] for line in _lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    records = _lines(run / "trees.jsonl")
    assert Counter(record["prompt_id"] for record in records) == {f"train:{row}": 2 for row in range(12)}
    for record, line in zip(records, (run / "trees.jsonl").read_bytes().splitlines(), strict=True):
        versions = np.concatenate([segment.versions for segment in from_json(line).segments])
        assert record["step"] - 3 <= versions.min() <= versions.max() <= record["step"] - 1


def _without_log_probs(line: bytes) -> dict[str, Any]:
    tree = json.loads(line)
    for segment in tree["segments"]:
        del segment["log_probs"]
    return tree
