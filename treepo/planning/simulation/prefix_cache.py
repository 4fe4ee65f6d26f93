"""SGLang's radix cache without tensors: which prefix of a context has its KV in memory. Units: tokens.

A node holds a run of tokens, and a path from the root spells a prefix. Nodes above a running request's last
node are locked; of the others, the leaf that was used longest ago is evicted first. Pages have one token.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, eq=False)
class Node:
    """tokens: int32 [T]. locks: running requests below. used: when it was last matched or made."""

    tokens: np.ndarray
    parent: "Node | None"
    children: "dict[int, Node]" = field(default_factory=dict)
    locks: int = 0
    used: int = 0


class PrefixCache:
    """size: tokens in the cache. locked: of those, tokens that must stay."""

    def __init__(self) -> None:
        self.size = 0
        self.locked = 0
        self._root = Node(np.empty(0, dtype=np.int32), None)
        self._clock = 0
        self._evictable: list[tuple[int, int, Node]] = []  # a heap; entries may be out of date
        self._pushed = 0

    def match(self, context: np.ndarray) -> tuple[Node, int]:
        """The node at which the longest cached prefix of `context` ends, and that prefix's length."""
        self._clock += 1
        node, length = self._root, 0
        while length < len(context):
            child = node.children.get(int(context[length]))
            if child is None:
                break
            same = _common(child.tokens, context[length:])
            if same < len(child.tokens):
                child = self._split(child, same)
            node, length = child, length + same
            self._use(node)
        return node, length

    def insert(self, context: np.ndarray) -> tuple[Node, int]:
        """Caches all of `context`. Returns its last node, and the number of its tokens that were new."""
        node, length = self.match(context)
        new = len(context) - length
        if new:
            child = Node(context[length:], node)
            node.children[int(context[length])] = child
            self.size += new
            node = child
            self._use(node)
        return node, new

    def lock(self, node: Node) -> None:
        """Keeps the path down to `node`."""
        above: Node | None = node
        while above is not None and above.parent is not None:
            if above.locks == 0:
                self.locked += len(above.tokens)
            above.locks += 1
            above = above.parent

    def unlock(self, node: Node) -> None:
        above: Node | None = node
        while above is not None and above.parent is not None:
            above.locks -= 1
            if above.locks == 0:
                self.locked -= len(above.tokens)
                self._offer(above)
            above = above.parent

    def evict(self, tokens: int) -> None:
        """Frees at least `tokens` if that many are unlocked, whole leaves at a time."""
        left = tokens
        while left > 0 and self._evictable:
            used, _, node = heapq.heappop(self._evictable)
            parent = node.parent
            if parent is None or node.used != used or node.locks or node.children:
                continue
            del parent.children[int(node.tokens[0])]
            node.parent = None  # its later entries are out of date
            self.size -= len(node.tokens)
            left -= len(node.tokens)
            self._offer(parent)

    def _use(self, node: Node) -> None:
        node.used = self._clock
        self._offer(node)

    def _offer(self, node: Node) -> None:
        if node.parent is not None and not node.locks and not node.children:
            self._pushed += 1
            heapq.heappush(self._evictable, (node.used, self._pushed, node))

    def _split(self, node: Node, length: int) -> Node:
        """Moves the node's first `length` tokens to a new node above it."""
        assert node.parent is not None
        upper = Node(node.tokens[:length], node.parent, locks=node.locks, used=node.used)
        upper.children[int(node.tokens[length])] = node
        node.parent.children[int(node.tokens[0])] = upper
        node.parent, node.tokens = upper, node.tokens[length:]
        return upper


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common prefix."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    at = int(different.argmax()) if length else 0
    return at if length and different[at] else length
