"""Random trees with hard cases: chains, one-token segments, leaves at every depth, equal leaves, and versions
that change at any token.
"""

from dataclasses import replace

import numpy as np

from treepo.routes import no_route
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict


def with_routes(tree: Tree, rng: np.random.Generator, dtype: type[np.unsignedinteger] = np.uint8) -> Tree:
    """The tree with random routes among 200 or 300 experts: 2 of them in each of 3 layers."""

    def draw(tokens: int) -> np.ndarray:
        return rng.integers(0, 200 if dtype is np.uint8 else 300, (tokens, 3, 2)).astype(dtype)

    segments = [replace(segment, routes=draw(len(segment.tokens))) for segment in tree.segments]
    for leaf in tree.leaves:
        routes = segments[leaf.segment].routes
        assert routes is not None
        routes[-1] = no_route(dtype)
    return replace(tree, segments=tuple(segments), prompt_routes=draw(len(tree.prompt)))


def with_draws(tree: Tree, rng: np.random.Generator) -> Tree:
    """The tree with segments of 1 to 4 draws."""
    draws = rng.integers(1, 5, len(tree.segments)).tolist()
    segments = zip(tree.segments, draws, strict=True)
    return replace(tree, segments=tuple(replace(segment, draws=each) for segment, each in segments))


def random_tree(
    rng: np.random.Generator,
    prompt_id: str = "p",
    *,
    max_depth: int = 5,
    max_children: int = 3,
    max_tokens: int = 6,
    vocabulary: int = 50,
) -> Tree:
    """Each segment has 0 to `max_children` children; a third of the siblings copy an elder's tokens."""
    segments: list[Segment] = []
    depth = {PROMPT: 0}
    open_parents = [PROMPT]
    while open_parents:
        parent = open_parents.pop(0)
        few = 1 if parent == PROMPT else 0
        children = int(rng.integers(few, max_children + 1)) if depth[parent] < max_depth else 0
        elder: np.ndarray | None = None
        for _ in range(children):
            tokens = rng.integers(0, vocabulary, rng.integers(1, max_tokens + 1)).astype(np.int32)
            if elder is not None and rng.random() < 1 / 3:
                tokens = elder
            elder = tokens
            log_probs = -rng.exponential(1.0, len(tokens)).astype(np.float32)
            open_parents.append(len(segments))
            depth[len(segments)] = depth[parent] + 1
            versions = np.sort(rng.integers(0, 3, len(tokens), dtype=np.int32))
            segments.append(Segment(parent, tokens, log_probs, versions, Finish.LENGTH))
    parents = {segment.parent for segment in segments}
    leaves = tuple(
        Leaf(index, Stop.EOS, float(rng.choice([-1.0, 1.0])), Verdict.CORRECT)
        for index in rng.permutation(
            [index for index in range(len(segments)) if index not in parents]
        ).tolist()
    )
    prompt = rng.integers(0, vocabulary, rng.integers(1, max_tokens + 1)).astype(np.int32)
    return Tree(prompt_id, prompt, tuple(segments), leaves)
