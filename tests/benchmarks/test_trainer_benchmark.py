"""The benchmarks of the trainer run dry, and count what they say."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.support.paths import ROOT

sys.path.append(str(ROOT))  # the benchmarks are run from there and not installed

from benchmarks.packed_and_flat import Setting, work
from benchmarks.random_model import SHAPES
from benchmarks.step_flops import Counts, every_token, step_flops, unique_tokens


def test_flops_are_those_that_torch_counts() -> None:
    sizes, length = SHAPES["tiny"], 40
    options: dict[str, Any] = {**sizes, "attn_implementation": "eager"}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**options))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
    # It computes every pair and masks half of them, and predicts after every token. Its rotary angles, which
    # need no gradient, are a matrix product too.
    ours = step_flops(sizes, Counts(tokens=length, trained=length, pairs=length**2))
    head_size = sizes["hidden_size"] // sizes["num_attention_heads"]
    assert counter.get_total_flops() == ours + 2 * (head_size // 2) * length


def test_a_cut_tree_counts_once() -> None:
    whole, cut = (Setting(2, 8, 32, 8, 2, max_tokens) for max_tokens in (1024, 100))
    one, other = (work(setting, vocabulary=50) for setting in (whole, cut))
    assert other.tokens("packed") > one.tokens("packed")
    assert unique_tokens(one.packs["packed"]) == unique_tokens(other.packs["packed"])
    assert unique_tokens(one.packs["packed"]).tokens == one.unique_tokens == one.tokens("packed")
    # 16 trajectories of 40 tokens in each of two trees; a trajectory of n tokens has n (n + 1) / 2 pairs.
    assert every_token(one.packs["flat"]) == Counts(2 * 16 * 40, 2 * 16 * 32, 2 * 16 * 40 * 41 // 2)


def _run(module: str, *options: str) -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, "-m", module, "--dry-run", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_the_cpu_benchmark_runs_dry() -> None:
    lines = _run("benchmarks.train_step")
    assert [line["layout"] for line in lines] == [
        {"tensor": 1, "pipeline": 1},
        {"tensor": 2, "pipeline": 2},
    ]
    for line in lines:
        assert line["packed_over_flat_time"] > 0
        assert line["packed_over_flat_cpu"] > 0
        assert line["unique_over_total"] == line["packed_over_flat_tokens"] < 1


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry_on_a_cpu() -> None:
    (line,) = _run("benchmarks.gpu.train_step", "--profile")
    # Float32: the tree's attention and flash attention of the same trajectories.
    assert 0 < line["log_prob_difference_mean"] <= line["log_prob_difference_max"] < 1e-5
    assert line["ideal_ratio"] > 1
    assert line["share_of_ideal"] == pytest.approx(line["flat_over_packed_time"] / line["ideal_ratio"])
    assert line["packed"]["matrix_share"] is None
    assert line["packed"]["seconds"] > 0
    for way in ("packed", "flat"):
        profile = line[way]["profile"]
        assert profile["busy"] > 0
        assert sum(profile["share"].values()) == pytest.approx(1)
        # On a CPU only these have names that the patterns know.
        for family in ("attention_forward", "attention_backward", "matmul", "optimizer"):
            assert profile["share"][family] > 0, family
