"""The run that faults are injected into: a random model, a reward that it sometimes gets, four short steps.

Its deadlines are short, so that a fault is noticed within seconds. All are in seconds.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
STEPS, PROMPTS, ROWS = 4, 4, 64
START_SECONDS, HEALTH_SECONDS, UPDATE_SECONDS, GRADE_SECONDS = 400.0, 10.0, 20.0, 5.0
SILENCE_SECONDS, DISK_SECONDS = 90.0, 60.0
HELDOUT_ROWS = 8
CONFIG = "run.yaml"
_PROGRAM = [sys.executable, "-c", "from treepo.cli.main import main; main()"]
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
"""Of the model: 11 buckets of 1 MiB, so that an update has stages that a fault can hit."""


def even_length(prompt: str, response: str, answer: str, extra: object) -> float:  # noqa: ARG001  the signature of every reward
    """A reward that a random model gets about half of the time."""
    return 1.0 if len(response) % 2 == 0 else -1.0


def slow_even_length(prompt: str, response: str, answer: str, extra: object) -> float:
    """The same, after a fifth of a second of computing: a phase that a fault can hit."""
    import time

    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    return even_length(prompt, response, answer, extra)


def write_inputs(folder: Path) -> None:
    """Write `folder`/model, train.jsonl and heldout.jsonl, unless an earlier call has."""
    done = folder / "inputs"
    if done.exists():
        return
    from benchmarks.random_model import write_model
    from treepo.toy.byte_tokenizer import byte_tokenizer
    from treepo.toy.problems import draw_problems, rows

    tokenizer: Any = byte_tokenizer(max_tokens=1024).hugging_face
    write_model(folder / "model", "float32", SHAPE, end_token=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", ROWS), ("heldout", HELDOUT_ROWS)):
        problems = rows(draw_problems(np.random.default_rng(0), count), name)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    done.touch()


def config_of(
    inputs: Path,
    out: Path,
    loop: str = "sync",
    transport: str = "colocated",
    steps: int = STEPS,
    split: bool = False,
) -> dict[str, Any]:
    """The configuration of a run. The rewards and the loss do not depend on an engine's rounding."""
    return {
        "out": str(out),
        "seed": 1,
        "steps": steps,
        "disk_seconds": DISK_SECONDS,
        "model": {"path": str(inputs / "model")},
        "data": {
            "train": str(inputs / "train.jsonl"),
            "prompts_per_step": PROMPTS,
            "max_prompt_tokens": 224,
        },
        "reward": {
            "workers": 2,
            "function": "benchmarks.chaos.scene:even_length",
            "deadline_seconds": GRADE_SECONDS,
        },
        "sampling": {
            "segment_tokens": 16,
            "max_depth": 4,
            "max_response_tokens": 64,
            "width": 4,
            "branching": 2,
            "initial_branching": 2,
        },
        "loop": {"mode": loop},
        "placement": "split" if split or loop == "async" or transport == "broadcast" else "colocated",
        "learning": {"mini_batches": 2, "importance": {"mode": "none"}},
        "trainer": {
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "max_tokens_per_pack": 512,
            "silence_seconds": SILENCE_SECONDS,
        },
        "engine": {
            "max_total_tokens": 8000,
            "start_seconds": START_SECONDS,
            "update_seconds": UPDATE_SECONDS,
            "health_seconds": HEALTH_SECONDS,
        },
        "weights": {"transport": transport, "bucket_mb": 1},
        "log_prob_check": {"enabled": False},
        "checkpoint": {"every": 1},
    }


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write `folder`/run.yaml."""
    path = folder / CONFIG
    path.write_text(yaml.safe_dump(config))
    return path


def train_command(config: Path, resume: bool, *overrides: str) -> list[str]:
    return [*_PROGRAM, "train", str(config), *overrides, *(["--resume"] if resume else [])]


def launch_command(config: Path, resume: bool, rank: int, head: str) -> list[str]:
    """The command of one of two nodes. head: address and port of the first."""
    nodes = ["--nodes", "2", "--node-rank", str(rank), "--head", head, "--cpus", "1"]
    return [*_PROGRAM, "launch", str(config), *(["--resume"] if resume else []), *nodes]


def start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a command of a run; what it prints is added to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def environment() -> dict[str, str]:
    """The environment of a run, whose configuration names a function of this module."""
    set_by_torch = "TORCHINDUCTOR_CACHE_DIR"  # in this process, which imports it
    ours = {name: value for name, value in os.environ.items() if name != set_by_torch}
    return ours | {"PYTHONPATH": str(ROOT)}
