"""A tree while it grows: a state machine that knows neither engines nor time.

A round is a set of path requests, one for each active path. When all of them are complete, `advance`
classifies the paths, branches, falls back if no path is active, and makes the path requests of the next
round. While the tree may still branch, a path request is for one segment; after that it is for all tokens
that its path may still get. (The official code goes on segment by segment, in step with all other prompts;
the trees are the same.)

With `branch.lookahead` a round in which a place gets several children begins with that many tokens of each
path. Then `advance` gives up children that agree with a sibling, and the others go on.

An engine may interrupt a request anywhere. Stop rules, depth and branching see whole segments only, so an
interruption changes nothing but versions, and tokens that depend on a request's seed.

Depth counts the segments of `segment_tokens` that a response fills, the last one even if partly; the two
pieces of a segment that a fallback cut has split count as one.
"""

from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rewards.grade import Grade
from treepo.rollout import branching, fallback, lookahead, rng
from treepo.rollout.cut_record import CutRecord
from treepo.rollout.leaf_grades import LeafGrades
from treepo.rollout.path import Node, PathRequest
from treepo.rollout.stopping import StopRule
from treepo.rollout.tree_routes import TreeRoutes
from treepo.routes import routes_of_piece
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree


def _unseen_tokens(node: Node | None, seen: set[int]) -> int:
    """Tokens of the node and its ancestors that are not in `seen` (ids of nodes) yet; adds them to it."""
    tokens = 0
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        tokens += len(node.tokens)
        node = node.parent
    return tokens


class GrowingTree:
    """The tree of one prompt.

    All randomness is keyed by (seed, step, prompt id) and a place in the tree. path_requests: the current
    round; empty when the tree is complete. branchings: paths that got more than one child. fallbacks: rounds
    that continued finished leaves because no path was active. pruned_tokens: of children that a lookahead
    gave up. routes: whether the tree has the routes of its tokens.
    """

    def __init__(
        self,
        prompt: Prompt,
        config: SamplingConfig,
        rule: StopRule,
        seed: int,
        step: int,
        *,
        routes: bool = False,
    ) -> None:
        self.prompt = prompt
        self.branchings = 0
        self.fallbacks = 0
        self.pruned_tokens = 0
        self._config = config
        self._rule = rule
        self._step = step
        self._names = (seed, step, prompt.id)
        self._nodes: list[Node] = []
        self._leaves: list[tuple[Node, Stop]] = []
        self._grades = LeafGrades(bool(config.reads_rewards))
        self._cuts = CutRecord()
        self._routes = TreeRoutes(routes)
        self._requested = 0
        self._round = 0
        self._width = config.least_leaves  # leaves that the tree wants
        self._agreed = False
        if config.mode == "sequential":
            children = self._width
        else:
            children = branching.initial_children(config, self._generator("initial"))
        self.path_requests = self._request_below([None], [children])

    def generate_request(self, path: PathRequest) -> GenerateRequest:
        """The request to send to an engine next for `path`."""
        wanted, segment_tokens = path.wanted, self._config.segment_tokens
        return GenerateRequest(
            context=path.context,
            prompt_tokens=len(self.prompt.tokens),
            max_tokens=wanted,
            temperature=self._config.temperature,
            seed=rng.seed(*self._names, "request", path.number, path.length),
            check_every=segment_tokens if wanted > segment_tokens else 0,
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            min_p=self._config.min_p,
            routes_from=self._routes.asked_from(path),
        )

    def receive(self, path: PathRequest, output: GenerateOutput) -> int:
        """Add an engine's tokens to `path`, up to the first segment boundary at which the path ends.

        Returns how many tokens were taken. If an engine returns less than requested, up to a segment boundary
        or anywhere if it was interrupted, the path request is not complete yet. Raises EngineError for an
        output that does not fit the request.
        """
        wanted, total = path.wanted, len(output.tokens)
        short = output.finish == "length" and total < wanted and total % self._config.segment_tokens
        if not 0 < total <= wanted or total != len(output.log_probs) or short:
            raise EngineError(
                f"the engine returned {total} tokens with {len(output.log_probs)} log-probs, finish "
                f"{output.finish}; {wanted} tokens were requested"
            )
        routes = self._routes.take(path, output)
        base, context = len(path.context), np.concatenate([path.context, output.tokens])
        taken = 0
        while taken < total and path.stop is None:
            piece = slice(taken, min(taken + path.segment_end - path.length, total))
            taken = piece.stop
            eos = output.finish == "eos" and taken == total
            of_piece = None if routes is None else routes_of_piece(routes, piece)
            path.add(output, piece, Finish.EOS if eos else Finish.LENGTH, self._rule, of_piece)
            path.context = context[: base + taken]
            if path.at_segment_end and not path.looks_ahead:
                self._classify(path)
        return taken

    def _classify(self, path: PathRequest) -> None:
        """Set why a path ends, at the end of a segment."""
        assert path.last_node is not None
        response = path.context[len(self.prompt.tokens) :]
        path.stop = self._rule.classify(response, path.last_node.box, path.at_eos)
        if path.stop is not None:
            self._routes.path_ended(path)

    @property
    def wants_grades(self) -> bool:
        """Whether `advance` reads the grades of all leaves. The round must be complete."""
        if not self._config.reads_rewards or any(path.stop is None for path in self.path_requests):
            return False
        if len(self._leaves) + len(self.path_requests) < self._width:
            return bool(self._config.fallback.read_rewards())
        return self._width < self._config.most_leaves

    def grade(self, path: PathRequest, grade: Grade) -> None:
        """Set the grade of the response of a path that has ended."""
        assert path.last_node is not None
        self._grades[path.last_node] = grade

    @property
    def grades(self) -> list[Grade] | None:
        """The grades of the complete tree's leaves, in their order; None if the policies read no rewards."""
        return [self._grades[node] for node, _ in self._leaves] if self._config.reads_rewards else None

    def advance(self) -> None:
        """End the round, whose path requests must be complete: classify, then branch or fall back.

        After a lookahead the round goes on. If the tree `wants_grades`, every leaf must have one.
        """
        if any(path.looks_ahead for path in self.path_requests):
            self._end_lookahead()
            return
        active: list[Node] = []
        finished_before = len(self._leaves)
        for path in self.path_requests:
            assert path.complete
            assert path.last_node is not None
            self._routes.round_ended(path)
            self._cuts.round_ended(path)
            self._nodes += path.new_nodes
            if path.stop is None:
                active.append(path.last_node)
            else:
                self._leaves.append((path.last_node, path.stop))
        self._round += 1
        if active:
            self.path_requests = self._branch(active, len(self._leaves) - finished_before)
        else:
            self._widen()
            self.path_requests = self._fall_back()

    def _end_lookahead(self) -> None:
        """Give up the children that agree with a sibling; the others go on to where they would have."""
        assert all(path.complete for path in self.path_requests)
        begun = sum(path.grown for path in self.path_requests)
        self.path_requests = lookahead.distinct(self.path_requests)
        self.pruned_tokens += begun - sum(path.grown for path in self.path_requests)
        saturated = self._saturated_by(len(self.path_requests))
        for path in self.path_requests:
            path.looks_ahead = False
            path.target_length = self._target_length(path.first_length, saturated)
            if path.at_segment_end:
                self._classify(path)

    def _widen(self) -> None:
        """If the tree has its least number of leaves, and they do not agree, it wants its most."""
        config = self._config
        if len(self._leaves) < self._width or self._width == config.most_leaves:
            return
        self._agreed = self._grades.agree()
        if not self._agreed:
            self._width = config.most_leaves

    def held(self) -> list[tuple[int, int]]:
        """Compute what a prefix cache had to hold during this round, which must be complete.

        Returns a pair for each path, the path that ended last first. Just before the path ended: the leaves
        that were still to come, and the response tokens on the unfinished paths, a shared token once. All
        paths count as decoded at the same rate.
        """
        grown = sorted(((path.grown, path) for path in self.path_requests), key=itemgetter(0))
        ended = sum(path.stop is not None for path in self.path_requests)
        leaves = self._config.most_leaves - len(self._leaves) - ended
        seen: set[int] = set()
        above = 0
        held: list[tuple[int, int]] = []
        for running, (length, path) in enumerate(reversed(grown), start=1):
            above += _unseen_tokens(path.new_nodes[0].parent, seen)
            leaves += path.stop is not None
            held.append((leaves, above + running * length))
        return held

    def above(self) -> int:
        """Response tokens on the unfinished paths, a shared token once."""
        seen: set[int] = set()
        return sum(_unseen_tokens(path.last_node, seen) for path in self.path_requests if path.stop is None)

    def finished(self) -> Tree:
        """The complete tree."""
        assert not self.path_requests
        nodes = self._depth_first()
        index_of = {node: index for index, node in enumerate(nodes)}
        return Tree(
            prompt_id=self.prompt.id,
            prompt=self.prompt.tokens,
            segments=tuple(
                Segment(
                    parent=PROMPT if node.parent is None else index_of[node.parent],
                    tokens=node.tokens,
                    log_probs=node.log_probs,
                    versions=node.versions,
                    finish=node.finish,
                    routes=node.routes,
                    draws=node.draws,
                )
                for node in nodes
            ),
            leaves=tuple(Leaf(segment=index_of[node], stop=stop) for node, stop in self._leaves),
            cuts=self._cuts.finished(index_of),
            agreed=self._agreed,
            prompt_routes=self._routes.of_prompt,
        )

    def _depth_first(self) -> list[Node]:
        """Parents before children, each subtree in one piece, siblings in the order of their path requests.

        So if a segment was cut, its lower piece is the first child of the upper one.
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

    def _branch(self, active: list[Node], finished_now: int) -> list[PathRequest]:
        config = self._config
        deep = [node for node in active if branching.may_branch(config, node.end)]
        if not deep:
            return self._request_below(active, [1] * len(active))
        bound = branching.leaf_bound(
            config, self._width, [node.end for node, _ in self._leaves], [node.end for node in active]
        )
        bound -= len(active) - len(deep)
        factor = branching.branching_factor(config, self._generator("branch"))
        budget = branching.step_budget(config, factor, bound, len(deep), finished_now, len(self._leaves))
        shares = branching.allocate(config, budget, deep, Node.response_log_probs, self._step)
        children_of = dict(zip(deep, shares, strict=True))
        self.branchings += sum(count > 1 for count in shares)
        last_nodes: list[Node | None] = []
        children: list[int] = []
        for node in active:
            for last_node, count in self._places(node, children_of.get(node, 1)):
                last_nodes.append(last_node)
                children.append(count)
        return self._request_below(last_nodes, children)

    def _places(self, node: Node, children: int) -> list[tuple[Node | None, int]]:
        """Where a path's children begin, and how many there: if not all at its end, one goes on there."""
        kept = branching.place(self._config, node.log_probs)
        if children == 1 or kept == len(node.tokens):
            return [(node, children)]
        return [(node, 1), (self._cut(node, node.end - len(node.tokens) + kept), children - 1)]

    def _fall_back(self) -> list[PathRequest]:
        """Continue finished leaves from a cut, a few times each, until the tree has requested its width."""
        config, leaves = self._config, self._leaves
        remaining = branching.leaf_bound(config, self._width, [node.end for node, _ in leaves], [])
        remaining -= len(leaves)
        if remaining > 0 and config.mode == "sequential":
            return self._request_below([None], [remaining])
        if remaining <= 0 or config.fallback.cut == "none":
            return []
        self.fallbacks += 1
        generator = self._generator("fallback")
        candidates = self._grades.candidates(leaves)
        last_nodes: list[Node | None] = []
        children: list[int] = []
        chosen = fallback.order(candidates, config, generator)
        if config.fallback.cut == "from_start":
            chosen = chosen[:1]
        for index in chosen or [None]:
            leaf = None if index is None else leaves[index][0]
            cut = 0 if index is None else fallback.cut_point(candidates[index], config, generator)
            last_nodes.append(None if leaf is None else self._cut(leaf, cut))
            children.append(min(branching.branching_factor(config, generator), remaining))
            first = self._requested + sum(children[:-1])
            counts = self._grades.below(last_nodes[-1])
            self._cuts.add(last_nodes[-1], leaf, len(leaves), counts, range(first, first + children[-1]))
            remaining -= children[-1]
            if remaining == 0:
                break
        return self._request_below(last_nodes, children)

    def _cut(self, leaf: Node, cut: int) -> Node | None:
        """The node that ends after `cut` tokens of the leaf's response; splits a node that spans the cut."""
        if cut == 0:
            return None
        node = next(node for node in leaf.path() if node.end >= cut)
        if node.end == cut:
            return node
        upper = node.split(cut, self._rule)
        self._nodes.append(upper)
        self._cuts.split(node, upper)
        return upper

    def _request_below(self, last_nodes: Sequence[Node | None], children: Sequence[int]) -> list[PathRequest]:
        """Path requests for the children of each node; None is the prompt."""
        ahead = lookahead.tokens(self._config, children)
        saturated = self._saturated_by(sum(children))
        requests: list[PathRequest] = []
        for node, count in zip(last_nodes, children, strict=True):
            above = [ancestor.tokens for ancestor in node.path()] if node else []
            context = np.concatenate([self.prompt.tokens, *above])
            length = node.end if node else 0
            target, size = self._target_length(length, saturated), self._config.segment_tokens
            if ahead:
                target = min(length + ahead, target)
            siblings = range(self._requested, self._requested + count)
            requests += (
                PathRequest(number, siblings, context, size, length, target, node, looks_ahead=ahead > 0)
                for number in siblings
            )
            self._requested += count
        return requests

    def _saturated_by(self, paths: int) -> bool:
        """Whether the leaves so far and this many paths use up the width, so that nothing branches again."""
        return len(self._leaves) + paths >= self._width

    def _target_length(self, length: int, saturated: bool) -> int:
        """Response tokens to which a path of `length` tokens grows in its next round.

        saturated: the tree will not branch again.
        """
        config = self._config
        if config.mode == "sequential":
            return config.max_response_tokens
        begun = -(-length // config.segment_tokens)
        segments = config.max_depth - begun if saturated else 1
        return min(length + segments * config.segment_tokens, config.max_response_tokens)

    def _generator(self, purpose: str) -> np.random.Generator:
        return rng.generator(*self._names, purpose, self._round)
