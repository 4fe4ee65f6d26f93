"""Leaf weights after a lookahead against exact values: every tree that can be sampled is enumerated."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.learning.cut_groups import Parts
from treepo.learning.estimators import inverse_branching
from treepo.learning.forest import Forest
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rewards.grade import Grade
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Tree
from treepo.verdict import Verdict

# A response ends with token 0 or has the length that the test says; what comes next depends on the last one.
NEXT = {1: {2: 0.7, 3: 0.3}, 2: {3: 0.6, 0: 0.4}, 3: {3: 0.2, 2: 0.8}}
TOLERANCE = 1e-12  # thousands of float64 that sum to 1
Response = tuple[int, ...]
Shares = defaultdict[Response, float]
Choose = Callable[[Sequence[float]], int]


def outcomes(sample: Callable[[Choose], Tree]) -> Iterator[tuple[float, Tree]]:
    """The probability and the result of each way that `sample` can go."""
    script: list[int] = []
    while True:
        chances: list[float] = []
        options: list[int] = []

        def choose(
            weights: Sequence[float], chances: list[float] = chances, seen: list[int] = options
        ) -> int:
            if len(seen) == len(script):
                script.append(0)
            choice = script[len(seen)]
            seen.append(len(weights))
            chances.append(weights[choice])
            return choice

        tree = sample(choose)
        yield float(np.prod(chances)), tree
        while script and script[-1] + 1 == options[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


def law(above: Response, longest: int) -> Shares:
    """The probability of each response that begins with these tokens."""
    if len(above) == longest or above[-1:] == (0,):
        return defaultdict(float, {above: 1.0})
    found: Shares = defaultdict(float)
    for token, chance in NEXT[above[-1] if above else 1].items():
        for response, probability in law((*above, token), longest).items():
            found[response] += chance * probability
    return found


def is_right(response: Response) -> bool:
    return sum(response) % 3 == 0


def grow(config: SamplingConfig, choose: Choose) -> Tree:
    def answer(request: GenerateRequest) -> GenerateOutput:
        tokens = request.context.tolist()
        while len(tokens) - len(request.context) < request.max_tokens and tokens[-1]:
            choices = NEXT[tokens[-1]]
            tokens.append(list(choices)[choose(list(choices.values()))])
        new = np.array(tokens[len(request.context) :], dtype=np.int32)
        finish = "length" if new[-1] else "eos"
        return GenerateOutput(new, np.full(len(new), -1, np.float32), 0, finish, 0)

    prompt = Prompt("p", np.array([1], dtype=np.int32), "", "", "")
    tree = GrowingTree(prompt, config, StopRule(config, lambda _: ""), seed=1, step=0)
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                tree.receive(path, answer(tree.generate_request(path)))
        for path in tree.path_requests:
            if path.stop is not None and config.reads_rewards:
                right = is_right(tuple(path.context[1:].tolist()))
                tree.grade(path, Grade(float(right), Verdict.CORRECT if right else Verdict.WRONG))
        tree.advance()
    whole = tree.finished()
    return whole.graded([(1.0, Verdict.CORRECT)] * len(whole.leaves))


def configured(longest: int, **values: Any) -> SamplingConfig:
    small = {
        "segment_tokens": 2,
        "max_depth": 2,
        "max_response_tokens": longest,
        "branch": {"lookahead": 1},
        "stops": {"boxed": "off", "repetition": {"check": "off"}},
    }
    return SamplingConfig.model_validate({**small, **values})


def parts_of(tree: Tree) -> list[tuple[Response, Shares]]:
    """The tokens above each part, and the share of each response in its leaf weights."""
    parts = Parts.of([tree], Forest.of([tree]))
    weight_L, part_L = inverse_branching(parts.forest), parts.forest.tree_L
    shares: list[Shares] = [defaultdict(float) for _ in range(part_L.max() + 1)]
    for leaf, part, weight in zip(parts.leaf_L, part_L, weight_L / np.bincount(part_L)[part_L], strict=True):
        shares[part][tuple(tree.response(tree.leaves[leaf]).tolist())] += weight
    above = [PROMPT, *(cut.parent for cut in tree.cuts)]
    tokens = [[tree.segments[each].tokens for each in tree.path(node)] for node in above]
    places = [tuple(np.concatenate([[], *each]).astype(int).tolist()) for each in tokens]
    return list(zip(places, shares, strict=True))


def without_draws(tree: Tree) -> Tree:
    return replace(tree, segments=tuple(replace(segment, draws=1) for segment in tree.segments))


def worst(found: Shares, wanted: Shares) -> float:
    return max(abs(found[response] - wanted[response]) for response in {*found, *wanted})


@pytest.mark.parametrize(
    ("width", "initial", "branching", "many"), [(3, 3, 1, 250), (4, 2, 2, 500), (3, 1, 3, 50)]
)
def test_weighted_leaves_are_a_sample_of_the_policy(
    width: int, initial: int, branching: int, many: int
) -> None:
    """The expected share of each response is its probability under the policy."""
    config = configured(
        4, width=width, initial_branching=initial, branching=branching, fallback={"cut": "none"}
    )
    shares: Shares = defaultdict(float)
    undrawn: Shares = defaultdict(float)
    total, trees = 0.0, 0
    for probability, tree in outcomes(lambda choose: grow(config, choose)):
        total, trees = total + probability, trees + 1
        for found, each in ((shares, tree), (undrawn, without_draws(tree))):
            ((_, of_tree),) = parts_of(each)
            for response, share in of_tree.items():
                found[response] += probability * share
    assert total == pytest.approx(1, abs=TOLERANCE)
    assert trees > many
    assert worst(shares, law((), 4)) < TOLERANCE
    assert worst(undrawn, law((), 4)) > 1e-3  # a child that stands for several draws counts too little


@pytest.mark.parametrize(
    ("longest", "values"),
    [
        (4, {"width": 3, "initial_branching": 2}),
        # One answer, and three continuations of its cut if it is wrong.
        (3, {"width": 4, "initial_branching": 1, "branching": 3, "max_depth": 3}),
    ],
)
def test_the_parts_of_cuts_are_samples_of_the_policy_below_them(longest: int, values: dict[str, Any]) -> None:
    """Though wrong answers are chosen to be cut: a fallback's children are compared with each other alone."""
    branch = {"lookahead": 1, "from_depth": values.get("max_depth", 2) - 1}
    config = configured(longest, **values, branch=branch, fallback={"order": "wrong", "cut": "pivot"})
    first: Shares = defaultdict(float)
    found: Shares = defaultdict(float)
    wanted: Shares = defaultdict(float)
    cuts = drawn = 0
    for probability, tree in outcomes(lambda choose: grow(config, choose)):
        (_, of_first), *others = parts_of(tree)
        for response, share in of_first.items():
            first[response] += probability * share
        for place, shares in others:
            for response, share in shares.items():
                found[response] += probability * share
            for response, chance in law(place, longest).items():
                wanted[response] += probability * chance
        cuts += len(others)
        drawn += any(tree.segments[each].draws > 1 for cut in tree.cuts for each in cut.segments)
    assert worst(first, law((), longest)) < TOLERANCE
    assert worst(found, wanted) < TOLERANCE
    assert cuts > 100
    assert drawn > 100
