"""Compare a train step on packed trees with one on the same trajectories one by one, on CPU.

    python benchmarks/packing.py

The batch is one prompt with 16 leaves in 512-token segments, each level twice as wide as the one above until
16: one micro-batch in both layouts. Packed and flat steps alternate on one thread. Seconds are CPU seconds
(other work on the machine does not count), medians of repeats. Memory is the process's peak minus its memory
before the step. One JSON line a setting; `time_over_bound` is packed_over_flat_time over
1.15 x unique_over_total (tokens, the prompt included).
"""

import argparse
import ctypes
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from full_tree import SEGMENT_TOKENS, WIDTH, full_tree
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_bridge.trainer import MegatronTrainer, create_store
from treepo.config.learning import LearningConfig
from treepo.config.trainer import TrainerConfig
from treepo.learning.advantage import estimate
from treepo.learning.loss import denominator
from treepo.learning.packing import Pack, pack_flat, pack_trees

PROMPT_TOKENS = 128
MODEL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_bytes(work: Callable[[], object]) -> int:
    """The rise of the resident memory during `work`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"/proc/self/status has no {key}"
    return int(match[1]) * 1024


def measure(
    trainer: MegatronTrainer, leaf_tokens: int, initial_branching: int, repeats: int
) -> dict[str, float]:
    config = LearningConfig()
    depth = leaf_tokens // SEGMENT_TOKENS
    trees = [
        full_tree(np.random.default_rng(0), depth, initial_branching, PROMPT_TOKENS, MODEL["vocab_size"])
    ]
    advantages = estimate(trees, config)
    total = WIDTH * (PROMPT_TOKENS + leaf_tokens)
    packs = {
        "packed": pack_trees(trees, advantages, total, 1),
        "flat": pack_flat(trees, advantages, total, 1),
    }
    assert [len(replica) for layout in packs.values() for replica in layout] == [1, 1]

    def step(layout: Sequence[Sequence[Pack]]) -> None:
        trainer.train_step(layout[0], temperature=1.0, denominator=denominator(layout, config))

    for layout in packs.values():
        step(layout)
    memory = {name: peak_bytes(lambda: step(layout)) for name, layout in packs.items()}  # noqa: B023 - called at once
    times: dict[str, list[float]] = {name: [] for name in packs}
    for _ in range(repeats):
        for name, layout in packs.items():
            times[name].append(cpu_seconds(lambda: step(layout)))  # noqa: B023 - called at once
    seconds = {name: statistics.median(values) for name, values in times.items()}
    unique = len(packs["packed"][0][0]) / total
    return {
        "leaf_tokens": leaf_tokens,
        "initial_branching": initial_branching,
        "packed_over_flat_time": seconds["packed"] / seconds["flat"],
        "packed_over_flat_memory": memory["packed"] / memory["flat"],
        "unique_over_total": unique,
        "time_over_bound": seconds["packed"] / seconds["flat"] / (1.15 * unique),
        "packed_seconds": seconds["packed"],
        "flat_seconds": seconds["flat"],
        "packed_mib": memory["packed"] / 2**20,
        "flat_mib": memory["flat"] / 2**20,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--leaf-tokens", type=int, nargs="+", default=[1024, 1536, 3072])
    parser.add_argument("--initial-branching", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = MODEL | {"width": WIDTH, "segment_tokens": SEGMENT_TOKENS, "prompt_tokens": PROMPT_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**MODEL)).save_pretrained(folder)
        trainer = MegatronTrainer(
            Path(folder), "float32", TrainerConfig(), LearningConfig(), 0, 1, create_store()
        )
        for leaf_tokens in arguments.leaf_tokens:
            for initial_branching in arguments.initial_branching:
                record = measure(trainer, leaf_tokens, initial_branching, arguments.repeats)
                rounded = {key: round(value, 4) for key, value in record.items()}
                print(json.dumps(rounded | settings), flush=True)  # noqa: T201 - the result
        trainer.close()


if __name__ == "__main__":
    main()
