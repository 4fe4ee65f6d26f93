"""Plans which prefixes of several contexts are computed first, so that no token is computed twice.

Pure. The contexts form a trie; a node of it is a prefix that two or more of them share. All tokens are int32.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The first `length` tokens of the context with index `context`.

    after: index of the shared prefix that must be computed before; None if there is none.
    """

    context: int
    length: int
    after: int | None


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """prefixes: each after the one that it needs. needed: for each context, the index of the prefix that must
    be computed before it; None if there is none.
    """

    prefixes: Sequence[SharedPrefix]
    needed: Sequence[int | None]


@dataclass(slots=True)
class _Node:
    """A shared prefix. above: the next shorter one; None for the root, which is empty."""

    context: int
    length: int
    above: "_Node | None"
    cached: bool = False
    below: "list[_Node]" = field(default_factory=list)
    rounds: int = 1
    longest: int = 0
    number: int | None = None


def plan_prefixes(
    contexts: Sequence[np.ndarray], shortest: int, is_cached: Callable[[np.ndarray], bool] = lambda _: False
) -> PrefixPlan:
    """Plan for contexts (int32 [T] each) of which SGLang computes at least the last token in any case.

    A shared prefix is planned if it has at least `shortest` tokens more than the shared prefix above it. Of
    the prefixes below one another, the longest is computed at once with those above it, so that n contexts
    need at most log2(n) + 1 rounds. is_cached: whether a prefix (int32 [T]) need not be computed.
    """
    heads = [context[:-1] for context in contexts]
    order = sorted(range(len(heads)), key=lambda index: heads[index].astype(">i4").tobytes())
    nodes, node_of = _trie(heads, order)
    for node in reversed(nodes):  # the longer ones first
        node.cached = any(child.cached for child in node.below) or is_cached(
            heads[node.context][: node.length]
        )
    kept: dict[int, _Node] = {}  # by id of each node: itself if it is planned, else the one above that is
    for node in nodes:
        above = None if node.above is None else kept[id(node.above)]
        long_enough = node.length - (above.length if above else 0) >= shortest
        kept[id(node)] = node if above is None or node.cached or long_enough else above
    planned = [node for node in nodes if kept[id(node)] is node]
    prefixes = _chains(planned, kept)
    return PrefixPlan(prefixes, [kept[id(node)].number for node in node_of])


def _trie(heads: Sequence[np.ndarray], order: Sequence[int]) -> tuple[list[_Node], list[_Node]]:
    """Its nodes, the shorter ones first, and the deepest node of each head. order: sorts the heads."""
    shared = [_common(heads[one], heads[next_]) for one, next_ in itertools.pairwise(order)]
    root = _Node(order[0], 0, None)
    nodes, open_nodes, node_of = [root], [root], [root] * len(heads)
    for index, left, right in zip(order, [0, *shared], [*shared, 0], strict=True):
        while open_nodes[-1].length > left:
            node = open_nodes.pop()
            if open_nodes[-1].length < left:  # a shorter prefix, which more contexts share
                open_nodes.append(_Node(node.context, left, open_nodes[-1]))
                nodes.append(open_nodes[-1])
            node.above = open_nodes[-1]
        if right > open_nodes[-1].length:
            open_nodes.append(_Node(index, right, open_nodes[-1]))
            nodes.append(open_nodes[-1])
        node_of[index] = open_nodes[-1]
    nodes.sort(key=lambda node: node.length)
    for node in nodes:
        if node.above is not None:
            node.above.below.append(node)
    return nodes, node_of


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of first tokens that both have."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _chains(planned: Sequence[_Node], kept: dict[int, _Node]) -> list[SharedPrefix]:
    """Join each planned prefix with one of those right below it, and number the chains that result."""
    below: dict[int, list[_Node]] = {id(node): [] for node in planned}
    for node in planned:
        if node.above is not None and not node.cached:
            below[id(kept[id(node.above)])].append(node)
    for node in reversed(planned):
        children = below[id(node)]
        children.sort(key=lambda child: (child.rounds, child.longest), reverse=True)
        rounds = [child.rounds + (number > 0) for number, child in enumerate(children)]
        node.rounds, node.longest = max(rounds, default=1), node.length
        if children:
            node.longest = children[0].longest
    prefixes: list[SharedPrefix] = []
    for node in planned:
        if node.cached or node.above is None or node.number is not None:
            continue
        above, end = kept[id(node.above)], node
        chain = [node]
        while below[id(end)]:
            end = below[id(end)][0]
            chain.append(end)
        for member in chain:
            member.number = len(prefixes)
        prefixes.append(SharedPrefix(end.context, end.length, above.number))
    return prefixes
