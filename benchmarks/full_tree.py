"""The tree that benchmarks measure: leaves of equal depth, each level twice as wide until it is full."""

import numpy as np

from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict

WIDTH, SEGMENT_TOKENS = 16, 512


def full_tree(
    rng: np.random.Generator,
    depth: int,
    initial_branching: int,
    prompt_tokens: int,
    vocabulary: int,
    segment_tokens: int = SEGMENT_TOKENS,
) -> Tree:
    """A tree of 16 leaves, each with `depth` segments above it; the last level has 16 even if doubling gives
    fewer.

    Tokens are random, rewards +1 or -1, and the engine's log-probs those of a uniform distribution.
    """
    segments: list[Segment] = []
    level = [PROMPT]
    for number in range(depth):
        wanted = WIDTH if number == depth - 1 else min(WIDTH, initial_branching * 2**number)
        parents = [level[index * len(level) // wanted] for index in range(wanted)]
        first = len(segments)
        for parent in parents:
            tokens = rng.integers(0, vocabulary, segment_tokens, dtype=np.int32)
            log_probs = np.full(segment_tokens, -np.log(vocabulary), dtype=np.float32)
            versions = np.zeros(segment_tokens, dtype=np.int32)
            segments.append(Segment(parent, tokens, log_probs, versions, Finish.LENGTH))
        level = list(range(first, len(segments)))
    leaves = tuple(
        Leaf(index, Stop.DEPTH, float(rng.choice([-1.0, 1.0])), Verdict.CORRECT) for index in level
    )
    prompt = rng.integers(0, vocabulary, prompt_tokens, dtype=np.int32)
    return Tree("p", prompt, tuple(segments), leaves)
