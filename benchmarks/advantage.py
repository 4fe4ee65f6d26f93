"""Time the numpy half of the learning rule: advantages and packing of trees in the paper's setting.

    OMP_NUM_THREADS=1 python benchmarks/advantage.py

A tree has 2, 4, 8, then 16 segments of 512 tokens at each depth down to 14. One JSON line a batch size.
`seconds_*` are CPU seconds on one core (other work on the machine does not count), medians of repeats;
`packing_tokens_per_second` counts packed tokens, repeated context included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from full_tree import full_tree

from treepo.config.learning import LearningConfig
from treepo.learning.advantage import estimate
from treepo.learning.estimators import ESTIMATORS
from treepo.learning.packing import pack_trees
from treepo.tree import Tree

DEPTH, PROMPT_TOKENS, VOCABULARY, MAX_TOKENS = 14, 256, 150_000, 16384


def batch(prompts: int, rng: np.random.Generator) -> list[Tree]:
    """Draw trees with different rewards; their tokens repeat, so that a large batch fits into memory."""
    kinds = [full_tree(rng, DEPTH, 2, PROMPT_TOKENS, VOCABULARY) for _ in range(8)]
    trees = []
    for index in range(prompts):
        kind = kinds[index % len(kinds)]
        leaves = tuple(replace(leaf, reward=float(rng.choice([-1.0, 1.0]))) for leaf in kind.leaves)
        trees.append(replace(kind, leaves=leaves))
    return trees


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds, the median of `repeats`."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(prompts: Sequence[int], packed_prompts: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    configs = {name: LearningConfig.model_validate({"estimator": name}) for name in ESTIMATORS}
    for count in prompts:
        trees = batch(count, rng)
        record: dict[str, float] = {
            "prompts": count,
            "segments": sum(len(tree.segments) for tree in trees),
            "seconds_advantages": seconds(lambda: estimate(trees, configs["treepo"]), repeats),  # noqa: B023 - called at once
        }
        if count == prompts[0]:
            for name, config in configs.items():
                record[f"seconds_{name}"] = seconds(lambda: estimate(trees, config), repeats)  # noqa: B023 - called at once
        some = trees[:packed_prompts]
        advantages = estimate(some, configs["treepo"])
        packed = sum(len(pack) for pack in pack_trees(some, advantages, MAX_TOKENS, 1)[0])
        pack_seconds = seconds(lambda: pack_trees(some, advantages, MAX_TOKENS, 8), repeats)  # noqa: B023 - called at once
        record |= {
            "packed_prompts": len(some),
            "packed_tokens": packed,
            "packed_over_unique": packed / sum(len(tree.prompt) + tree.unique_tokens() for tree in some),
            "seconds_packing": pack_seconds,
            "packing_tokens_per_second": packed / pack_seconds,
        }
        print(json.dumps({key: round(value, 4) for key, value in record.items()}))  # noqa: T201 - the result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--packed-prompts", type=int, default=64, help="prompts that are also packed")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    measure(arguments.prompts, arguments.packed_prompts, arguments.repeats)
