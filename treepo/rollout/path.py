"""The nodes of a growing tree, and what one path of it still needs in a round.

A path request is divided into segments of `segment_tokens`, counted from where it began: after an unaligned
fallback cut, anywhere in the response. An engine may interrupt a request for its tokens anywhere. Then the
last node is a part of a segment, and the next tokens are added to it.
"""

from dataclasses import dataclass, field

import numpy as np

from treepo.protocols import GenerateOutput
from treepo.rollout.boxed import BoxScan
from treepo.rollout.stopping import StopRule
from treepo.tree import Finish, Stop


@dataclass(slots=True, eq=False)
class Node:
    """A segment of a growing tree.

    tokens, log_probs, versions, routes, draws: as in `treepo.tree.Segment`. end: length in tokens of the
    response that ends here. box: the search for a box in that response.
    """

    parent: "Node | None"
    tokens: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    finish: Finish
    end: int
    box: BoxScan
    routes: np.ndarray | None = None
    draws: int = 1

    def path(self) -> "list[Node]":
        """The nodes from the prompt's child down to this one, both included."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def split(self, end: int, rule: StopRule) -> "Node":
        """Split the node at `end` tokens of the response, a place strictly within it.

        Returns the upper part as a new node. This node becomes the lower part, its child.
        """
        keep = end - (self.end - len(self.tokens))
        upper = Node(
            parent=self.parent,
            tokens=self.tokens[:keep],
            log_probs=self.log_probs[:keep],
            versions=self.versions[:keep],
            finish=Finish.CUT,
            end=end,
            box=rule.scan(self.parent.box if self.parent else BoxScan(), self.tokens[:keep]),
            draws=self.draws,
        )
        self.parent, self.tokens, self.draws = upper, self.tokens[keep:], 1
        self.log_probs, self.versions = self.log_probs[keep:], self.versions[keep:]
        if self.routes is not None:  # the cut's last token has one: the rest of the segment read it
            upper.routes, self.routes = self.routes[:keep], self.routes[keep:]
        return upper

    def response_log_probs(self) -> np.ndarray:
        """Log-probs of the response that ends here: float32 [T]."""
        return np.concatenate([node.log_probs for node in self.path()])


@dataclass(slots=True, eq=False)
class PathRequest:
    """The tokens that one path needs in one round.

    number: unique in the tree, in the order of creation. siblings: the numbers of all children that one
    branching or cut asked for below this path request's node, its own included. context: int32 [T], prompt
    and response so far. first_length, target_length: response tokens at which the path request began, and at
    which it is complete. last_node: the path's last node, None at the prompt. looks_ahead: whether its target
    is the end of a lookahead, where no path stops yet. new_nodes: nodes that this round added. stop: why the
    path ended; None while it goes on. route_above: of the last token above the new nodes, as this path
    request read it; None without routes.
    """

    number: int
    siblings: range
    context: np.ndarray
    segment_tokens: int
    first_length: int
    target_length: int
    last_node: Node | None
    looks_ahead: bool = False
    new_nodes: list[Node] = field(default_factory=list)
    stop: Stop | None = None
    route_above: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Response tokens so far."""
        return self.last_node.end if self.last_node else 0

    @property
    def grown(self) -> int:
        """Tokens that this round has added."""
        return self.length - self.first_length

    @property
    def complete(self) -> bool:
        return self.stop is not None or self.at_eos or self.length == self.target_length

    @property
    def at_eos(self) -> bool:
        """Whether the last token ends the sequence."""
        return self.last_node is not None and self.last_node.finish is Finish.EOS

    @property
    def within_segment(self) -> bool:
        """Whether the last node is a part of a segment."""
        return (self.length - self.first_length) % self.segment_tokens > 0

    @property
    def at_segment_end(self) -> bool:
        """Whether the stop rules look at the path here."""
        return self.at_eos or self.length == self.target_length or not self.within_segment

    @property
    def segment_end(self) -> int:
        """Response tokens at which the segment ends to which the next token belongs."""
        whole = (self.length - self.first_length) // self.segment_tokens
        return min(self.first_length + (whole + 1) * self.segment_tokens, self.target_length)

    @property
    def wanted(self) -> int:
        """Tokens to request next: all that the path needs, or only the rest of its segment.

        An engine applies the stop rule at multiples of `segment_tokens` of new tokens. So that these are
        segment boundaries, a request for more than one segment begins at one.
        """
        return (self.segment_end if self.within_segment else self.target_length) - self.length

    def add(
        self,
        output: GenerateOutput,
        piece: slice,
        finish: Finish,
        rule: StopRule,
        routes: np.ndarray | None = None,
    ) -> Node:
        """Add a piece of an output, at most to the end of the segment; returns the last node.

        routes: of the piece's tokens. Arrays are copied: Ray's store keeps an answer, with the routes of all
        its tokens, as long as a part of it is used.
        """
        tokens, log_probs = output.tokens[piece].copy(), output.log_probs[piece].copy()
        versions = np.full(len(tokens), output.version, dtype=np.int32)
        end, node = self.length + len(tokens), self.last_node
        box = rule.scan(node.box if node else BoxScan(), tokens)
        if node is not None and self.within_segment:
            node.tokens = np.concatenate([node.tokens, tokens])
            node.log_probs = np.concatenate([node.log_probs, log_probs])
            node.versions = np.concatenate([node.versions, versions])
            if node.routes is not None and routes is not None:
                node.routes = np.concatenate([node.routes, routes])
            node.finish, node.end, node.box = finish, end, box
            return node
        self.last_node = Node(node, tokens, log_probs, versions, finish, end, box, routes)
        self.new_nodes.append(self.last_node)
        return self.last_node
