"""Measures what adaptive width saves under dynamic sampling, on a simulated policy.

    python -m benchmarks.adaptive_width

Each prompt has a chance of its own that a segment contains a slip, from a Beta distribution, and a slip is
recovered with a fixed chance in each later segment; so answers that share segments agree more often than
others. An answer is right if it ends without an open slip. Prompts are sampled until `--trees` trees have
both right and wrong answers, as dynamic sampling does; trees whose answers agree are dropped.

Prints one JSON line a setting. `dropped`: share of the decoded tokens that are in dropped trees.
`tokens_per_tree`, `tokens_per_leaf`: decoded tokens for each kept tree, and for each leaf in one.
`informative`: share of the prompts whose trees are kept. The driver is the real one; the engine decodes
nothing, and its lengths are log-normal. Needs one core for a minute.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import orjson

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rewards.grade import Grade
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree
from treepo.verdict import Verdict

SEGMENT_TOKENS = 64
WIDTHS: tuple[int | str, ...] = (16, 8, 4, "4-16", "6-16", "8-16")
RECOVERY = 0.1
FIXED, SLIP, MEND = 2, 3, 4  # tokens: each segment begins with one of them
EOS = 0


@dataclass
class SlippingEngine:
    """difficulties: the chance of a slip in each segment, by the prompt's first token."""

    mean_tokens: float
    difficulties: np.ndarray
    decoded: int = field(default=0)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        await asyncio.sleep(0)
        rng = np.random.default_rng(request.seed)
        ends = rng.random(request.max_tokens) < 1 / self.mean_tokens
        length = int(np.argmax(ends)) + 1 if ends.any() else request.max_tokens
        tokens = np.full(length, FIXED, dtype=np.int32)
        starts = np.arange(0, length, SEGMENT_TOKENS)
        slips = rng.random(len(starts)) < self.difficulties[request.context[0]]
        mends = rng.random(len(starts)) < RECOVERY
        tokens[starts] = np.where(slips, SLIP, np.where(mends, MEND, FIXED))
        if ends.any():
            tokens[-1] = EOS if length > 1 else tokens[-1]
        self.decoded += length
        return GenerateOutput(
            tokens=tokens,
            log_probs=np.full(length, -1, dtype=np.float32),
            version=0,
            finish="eos" if ends.any() else "length",
            cached_tokens=len(request.context) - 1,
        )


def is_right(response: np.ndarray) -> bool:
    """Whether no slip is open at the end."""
    marks = response[(response == SLIP) | (response == MEND)]
    return not len(marks) or bool(marks[-1] == MEND)


async def grade(_prompt: Prompt, response: np.ndarray) -> Grade:
    right = is_right(response)
    return Grade(float(right), Verdict.CORRECT if right else Verdict.WRONG)


async def measure(width: int | str, mode: str, alpha: float, beta: float, wanted: int) -> dict[str, object]:
    sampling = SamplingConfig.model_validate(
        {
            "mode": mode,
            "width": width,
            "segment_tokens": SEGMENT_TOKENS,
            "max_response_tokens": SEGMENT_TOKENS * 14,
            "stops": {"repetition": {"check": "off"}, "boxed": "off"},
            "max_live_trees": 1,
        }
    )
    difficulties = np.random.default_rng(1).beta(alpha, beta, size=100_000)
    engine = SlippingEngine(SEGMENT_TOKENS * 5, difficulties)
    driver = TreeDriver([engine], sampling, lambda _: "", seed=0, grade=grade)

    def prompts() -> Iterator[Prompt]:
        for number in range(len(difficulties)):
            yield Prompt(str(number), np.array([number, 1], dtype=np.int32), "", "", "")

    kept = leaves = dropped_tokens = tokens = trees = 0
    async with aclosing(driver.sample(prompts(), step=0)) as results:
        async for tree in results:
            assert isinstance(tree, Tree), tree
            trees += 1
            rights = {is_right(tree.response(leaf)) for leaf in tree.leaves}
            tokens += tree.unique_tokens()
            if len(rights) > 1:
                kept += 1
                leaves += len(tree.leaves)
            else:
                dropped_tokens += tree.unique_tokens()
            if kept == wanted:
                break
    return {
        "mode": mode,
        "width": width,
        "slips": f"Beta({alpha:g}, {beta:g})",
        "informative": round(kept / trees, 3),
        "dropped": round(dropped_tokens / tokens, 3),
        "tokens_per_tree": round(tokens / kept),
        "tokens_per_leaf": round(tokens / leaves, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Adaptive width under dynamic sampling, simulated.")
    parser.add_argument("--trees", type=int, default=200, help="trees to keep in each setting")
    wanted = parser.parse_args().trees
    for alpha, beta in ((0.3, 4.0), (0.3, 1.0)):
        for mode in ("tree", "sequential"):
            for width in WIDTHS:
                line = asyncio.run(measure(width, mode, alpha, beta, wanted))
                sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
