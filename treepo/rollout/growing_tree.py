"""One tree while it grows: a state machine that knows no engine and no clock.

A round is a set of asks, one for each active path. When the driver has every ask's tokens, `advance`
classifies the paths, branches, falls back if none is active, and sets the next round's asks. As long as
the tree may still branch an ask is for one segment; after that it is for all that its path may still have
(the official code goes on segment by segment, in step with every other prompt; the trees are the same).

Depth counts segments of `segment_tokens` that the response fills, begun ones included; the pieces of a
segment that a fallback cut count as the one they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout import branching, fallback, rng
from treepo.rollout.boxed import BoxScan
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree


@dataclass(slots=True, eq=False)
class Node:
    """A segment in a growing tree. end: response tokens down to its last one; box: the scan of those."""

    parent: "Node | None"
    tokens: np.ndarray
    log_probs: np.ndarray
    version: int
    finish: Finish
    end: int
    box: BoxScan

    def path(self) -> "list[Node]":
        """Nodes from the prompt's child down to this one, both included."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def response_log_probs(self) -> np.ndarray:
        """Log-probs of the response that ends here: float32 [T]."""
        return np.concatenate([node.log_probs for node in self.path()])


@dataclass(slots=True, eq=False)
class Ask:
    """What one path needs in one round.

    number: in the order of asking, unique in the tree. context: int32 [T], prompt and response so far.
    goal: response tokens at which the path has what it needs. tip: the path's last node, None at the
    prompt. new: the nodes of this round. stop: why the path ended, None while it has not.
    """

    number: int
    context: np.ndarray
    goal: int
    tip: Node | None
    new: list[Node] = field(default_factory=list)
    stop: Stop | None = None

    @property
    def length(self) -> int:
        return self.tip.end if self.tip else 0

    @property
    def complete(self) -> bool:
        return self.stop is not None or self.length == self.goal


def _unseen(node: Node | None, seen: set[int]) -> int:
    """Tokens of the node and its ancestors that are not in `seen` yet, where they are added."""
    tokens = 0
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        tokens += len(node.tokens)
        node = node.parent
    return tokens


def longest_response(config: SamplingConfig) -> int:
    """Most tokens that a response can have."""
    if config.mode == "sequential":
        return config.max_response_tokens
    return min(config.max_depth * config.segment_tokens, config.max_response_tokens)


class GrowingTree:
    """A tree of one prompt. Everything random in it is keyed by (seed, step, prompt id) and a place in it.

    asks: the current round, empty when the tree is complete. tokens: response tokens that it holds.
    branchings: paths that were given more than one child. fallbacks: rounds that it had no active path
    for and continued finished leaves instead.
    """

    def __init__(self, prompt: Prompt, config: SamplingConfig, rule: StopRule, seed: int, step: int) -> None:
        self.prompt = prompt
        self.tokens = 0
        self.branchings = 0
        self.fallbacks = 0
        self._config = config
        self._rule = rule
        self._step = step
        self._names = (seed, step, prompt.id)
        self._nodes: list[Node] = []
        self._leaves: list[tuple[Node, Stop]] = []
        self._asked = 0
        self._round = 0
        if config.mode == "sequential":
            children = config.width
        else:
            children = branching.initial_children(config, self._generator("initial"))
        self.asks = self._ask_below([None], [children])

    def request(self, ask: Ask) -> GenerateRequest:
        """What an engine has to be asked next for `ask`."""
        wanted, segment_tokens = ask.goal - ask.length, self._config.segment_tokens
        return GenerateRequest(
            context=ask.context,
            prompt_tokens=len(self.prompt.tokens),
            max_tokens=wanted,
            temperature=self._config.temperature,
            seed=rng.seed(*self._names, "request", ask.number, ask.length),
            check_every=segment_tokens if wanted > segment_tokens else 0,
        )

    def receive(self, ask: Ask, output: GenerateOutput) -> int:
        """Take in tokens of one ask, segment by segment, up to the first boundary at which the path ends.

        Returns how many tokens were taken. An engine may return less than asked, at a segment boundary; the
        ask is then not complete. Raises EngineError for an output that does not fit the request.
        """
        segment_tokens, total = self._config.segment_tokens, len(output.tokens)
        wanted = ask.goal - ask.length
        short = output.finish == "length" and total < wanted and total % segment_tokens
        if not 0 < total <= wanted or total != len(output.log_probs) or short:
            raise EngineError(
                f"asked for {wanted} tokens the engine returned {total} with {len(output.log_probs)} "
                f"log-probs, finish {output.finish}"
            )
        base, prompt_tokens = len(ask.context), len(self.prompt.tokens)
        context = np.concatenate([ask.context, output.tokens])
        taken = 0
        while taken < total and ask.stop is None:
            piece = slice(taken, min(taken + segment_tokens, total))
            taken = piece.stop
            eos = output.finish == "eos" and taken == total
            ask.tip = self._node(ask.tip, output, piece, Finish.EOS if eos else Finish.LENGTH)
            ask.new.append(ask.tip)
            ask.stop = self._rule.classify(context[prompt_tokens : base + taken], ask.tip.box, eos)
        ask.context = context[: base + taken]
        self.tokens += taken
        return taken

    def advance(self) -> None:
        """End the round: every ask is complete. Classify, branch, and fall back if no path is active."""
        active: list[Node] = []
        finished_before = len(self._leaves)
        for ask in self.asks:
            assert ask.complete
            assert ask.tip is not None
            self._nodes += ask.new
            if ask.stop is None:
                active.append(ask.tip)
            else:
                self._leaves.append((ask.tip, ask.stop))
        self._round += 1
        if active:
            self.asks = self._branch(active, len(self._leaves) - finished_before)
        else:
            self.asks = self._fall_back()

    def held(self) -> list[tuple[int, int]]:
        """For the end of each of this round's paths: leaves to come, and response tokens on the unfinished
        paths, a shared one once. These had to stay in a prefix cache, had all been decoded at one rate.
        Called when the round is complete.
        """
        grown = sorted(
            ((sum(len(node.tokens) for node in ask.new), ask) for ask in self.asks), key=itemgetter(0)
        )
        leaves = self._config.width - len(self._leaves) - sum(ask.stop is not None for ask in self.asks)
        seen: set[int] = set()
        above = 0
        held: list[tuple[int, int]] = []
        for number, (length, ask) in enumerate(reversed(grown), start=1):
            above += _unseen(ask.new[0].parent, seen)
            leaves += ask.stop is not None
            held.append((leaves, above + number * length))
        return held

    def above(self) -> int:
        """Response tokens above the ends of the paths that have not ended, a shared one once."""
        seen: set[int] = set()
        return sum(_unseen(ask.tip, seen) for ask in self.asks if ask.stop is None)

    def finished(self) -> Tree:
        """The tree, once it has no asks left."""
        assert not self.asks
        nodes = self._depth_first()
        index_of = {id(node): index for index, node in enumerate(nodes)}
        return Tree(
            prompt_id=self.prompt.id,
            prompt=self.prompt.tokens,
            segments=tuple(
                Segment(
                    parent=PROMPT if node.parent is None else index_of[id(node.parent)],
                    tokens=node.tokens,
                    log_probs=node.log_probs,
                    version=node.version,
                    finish=node.finish,
                )
                for node in nodes
            ),
            leaves=tuple(Leaf(segment=index_of[id(node)], stop=stop) for node, stop in self._leaves),
        )

    def _depth_first(self) -> list[Node]:
        """Parents before children, a subtree in one piece, siblings in the order of asking.

        So the rest of a segment that was cut is the first child of its upper part.
        """
        children: dict[int, list[Node]] = {}
        for node in self._nodes:
            children.setdefault(id(node.parent), []).append(node)
        nodes: list[Node] = []
        todo = children[id(None)][::-1]
        while todo:
            nodes.append(todo.pop())
            todo += children.get(id(nodes[-1]), [])[::-1]
        return nodes

    def _node(self, parent: Node | None, output: GenerateOutput, piece: slice, finish: Finish) -> Node:
        tokens = output.tokens[piece]
        above, box = (parent.end, parent.box) if parent else (0, BoxScan())
        return Node(
            parent=parent,
            tokens=tokens,
            log_probs=output.log_probs[piece],
            version=output.version,
            finish=finish,
            end=above + len(tokens),
            box=self._rule.scan(box, tokens),
        )

    def _branch(self, active: list[Node], finished_now: int) -> list[Ask]:
        config = self._config
        bound = branching.leaf_bound(
            config, [node.end for node, _ in self._leaves], [node.end for node in active]
        )
        factor = branching.branching_factor(config, self._generator("branch"))
        budget = branching.step_budget(config, factor, bound, len(active), finished_now, len(self._leaves))
        children = branching.allocate(config, budget, active, Node.response_log_probs, self._step)
        self.branchings += sum(count > 1 for count in children)
        return self._ask_below(active, children)

    def _fall_back(self) -> list[Ask]:
        """Continue finished leaves from a cut, a few times each, until the tree has asked for its width."""
        config, leaves = self._config, self._leaves
        remaining = branching.leaf_bound(config, [node.end for node, _ in leaves], []) - len(leaves)
        if remaining <= 0 or config.fallback.cut == "none":
            return []
        self.fallbacks += 1
        generator = self._generator("fallback")
        candidates = [
            fallback.Candidate(stop, node.response_log_probs(), [above.end for above in node.path()])
            for node, stop in leaves
        ]
        tips: list[Node | None] = []
        children: list[int] = []
        chosen = fallback.order(candidates, config, generator)
        if config.fallback.cut == "from_start":
            chosen = chosen[:1]
        for index in chosen or [None]:
            cut = 0 if index is None else fallback.cut_point(candidates[index], config, generator)
            tips.append(None if index is None else self._cut(leaves[index][0], cut))
            children.append(min(branching.branching_factor(config, generator), remaining))
            remaining -= children[-1]
            if remaining == 0:
                break
        return self._ask_below(tips, children)

    def _cut(self, leaf: Node, cut: int) -> Node | None:
        """The node that ends after `cut` tokens of the leaf's response; a node that spans it is split."""
        if cut == 0:
            return None
        node = next(node for node in leaf.path() if node.end >= cut)
        if node.end == cut:
            return node
        keep = cut - (node.end - len(node.tokens))
        box = node.parent.box if node.parent else BoxScan()
        upper = Node(
            parent=node.parent,
            tokens=node.tokens[:keep],
            log_probs=node.log_probs[:keep],
            version=node.version,
            finish=Finish.CUT,
            end=cut,
            box=self._rule.scan(box, node.tokens[:keep]),
        )
        node.parent, node.tokens, node.log_probs = upper, node.tokens[keep:], node.log_probs[keep:]
        self._nodes.append(upper)
        return upper

    def _ask_below(self, tips: Sequence[Node | None], children: Sequence[int]) -> list[Ask]:
        saturated = len(self._leaves) + sum(children) >= self._config.width
        asks: list[Ask] = []
        for tip, count in zip(tips, children, strict=True):
            above = [node.tokens for node in tip.path()] if tip else []
            context = np.concatenate([self.prompt.tokens, *above])
            goal = self._goal(tip.end if tip else 0, saturated)
            numbers = range(self._asked, self._asked + count)
            asks += (Ask(number=number, context=context, goal=goal, tip=tip) for number in numbers)
            self._asked += count
        return asks

    def _goal(self, length: int, saturated: bool) -> int:
        """Response length up to which a path of `length` tokens asks in one go."""
        config = self._config
        if config.mode == "sequential":
            return config.max_response_tokens
        begun = -(-length // config.segment_tokens)
        segments = config.max_depth - begun if saturated else 1
        return min(length + segments * config.segment_tokens, config.max_response_tokens)

    def _generator(self, purpose: str) -> np.random.Generator:
        return rng.generator(*self._names, purpose, self._round)
