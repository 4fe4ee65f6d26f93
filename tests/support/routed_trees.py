"""Trees with given routes, and routes at random."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from treepo.routes import dtype_for, no_route
from treepo.tree import PROMPT, Tree


def with_given_routes(tree: Tree, routes: Callable[[int, int], np.ndarray]) -> Tree:
    """The tree with `routes(segment, tokens)` for each of its segments, and for its prompt as PROMPT."""
    segments = tuple(
        replace(segment, routes=routes(index, len(segment.tokens)))
        for index, segment in enumerate(tree.segments)
    )
    return replace(tree, segments=segments, prompt_routes=routes(PROMPT, len(tree.prompt)))


def random_routes(
    rng: np.random.Generator, tokens: int, layers: int, experts: int, per_token: int, missing: float = 0.0
) -> np.ndarray:
    """Routes of some tokens, of which the share `missing` has none: [tokens, layers, per_token]."""
    dtype = dtype_for(experts)
    chosen = rng.random((tokens, layers, experts)).argsort(-1)[..., :per_token].astype(dtype)
    chosen[rng.random(tokens) < missing] = no_route(dtype)
    return chosen
