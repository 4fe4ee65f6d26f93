"""The tree that is measured: leaves equally deep, each level twice as wide as the one above until full."""

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
    """`depth` segments above each of 16 leaves: the last level is full even where doubling would not fill it.
    Tokens are random and rewards +1 or -1; the engine's log-probs are those of a uniform distribution.
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
            segments.append(Segment(parent, tokens, log_probs, 0, Finish.LENGTH))
        level = list(range(first, len(segments)))
    leaves = tuple(
        Leaf(index, Stop.DEPTH, float(rng.choice([-1.0, 1.0])), Verdict.CORRECT) for index in level
    )
    prompt = rng.integers(0, vocabulary, prompt_tokens, dtype=np.int32)
    return Tree("p", prompt, tuple(segments), leaves)
