"""Lookahead: children of one branching or cut whose first tokens agree are one child, drawn several times.

The first of them goes on and the others are given up. Drawing c children and keeping one of each m that
agree, with the weight m / c, leaves every expectation as it is: what follows equal tokens is drawn from the
same distribution, whichever child draws it.
"""

from collections.abc import Sequence

from treepo.config.sampling import SamplingConfig
from treepo.rollout.path import PathRequest


def tokens(config: SamplingConfig, children: Sequence[int]) -> int:
    """Tokens that each path of a round samples first. children: of each place; 0 if all have one child."""
    if config.mode == "sequential" or config.branch.lookahead is None or max(children, default=0) < 2:
        return 0
    return config.branch.lookahead


def distinct(paths: Sequence[PathRequest]) -> list[PathRequest]:
    """The path requests that go on after a lookahead, each with the draws that it stands for."""
    kept: dict[tuple[int, bytes], PathRequest] = {}
    for path in paths:
        (node,) = path.new_nodes
        first = kept.setdefault((path.siblings.start, node.tokens.tobytes()), path)
        if first is not path:
            first.new_nodes[0].draws += 1
    return list(kept.values())
