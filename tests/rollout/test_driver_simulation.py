"""Trees compared with a straight-line simulation of the paper's loop, for every policy.

The simulation keeps token lists of one prompt, goes on segment by segment, and shares no code with the
product. Both use a model that draws tokens by chance; means over thousands of trees are compared.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.fake_grader import FakeGrader, right
from treepo.config.sampling import SamplingConfig
from treepo.data.prompts import Prompt
from treepo.rollout.growing_tree import GrowingTree
from treepo.rollout.policies import ALLOCATIONS, BUDGETS, CUTS, ORDERS, PLACES
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree


@dataclass
class Chances:
    end: float = 0.03
    box: float = 0.02
    letters: int = 500


@dataclass
class Path:
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    stop: str = ""
    branched: bool = False

    def cut(self, length: int) -> "Path":
        bounds = [bound for bound in self.bounds if bound < length] + [length] * (length > 0)
        return Path(self.tokens[:length], self.log_probs[:length], bounds)


def naive_repeats(tokens: list[int], config: SamplingConfig) -> bool:
    rule = config.stops.repetition
    window, found, position = rule.window_tokens, 0, len(tokens)
    last = tokens[-window:]
    while position >= window:
        if tokens[position - window : position] == last:
            found, position = found + 1, position - window
        else:
            position -= 1
    return found >= rule.count


def why_it_ends(path: Path, config: SamplingConfig) -> str:
    stops = config.stops
    looping = stops.repetition.check != "off" and naive_repeats(path.tokens, config)
    boxed, ended = 1 in path.tokens and stops.boxed != "off", path.tokens[-1] == 0
    if looping and stops.repetition.check == "first":
        return "repetition"
    if boxed and (stops.boxed == "end" or ended):
        return "boxed"
    if ended:
        return "eos"
    if len(path.tokens) == config.max_response_tokens:
        return "limit"
    if math.ceil(len(path.tokens) / config.segment_tokens) == config.max_depth:
        return "depth"
    return "repetition" if looping else ""


def sample_segment(path: Path, chances: Chances, config: SamplingConfig, rng: random.Random) -> Path:
    child = Path(list(path.tokens), list(path.log_probs), list(path.bounds))
    for _ in range(config.segment_tokens):
        if len(child.tokens) == config.max_response_tokens:
            break
        u = rng.random()
        token = (
            0 if u < chances.end else 1 if u < chances.end + chances.box else rng.randint(2, chances.letters)
        )
        child.tokens.append(token)
        child.log_probs.append(-2 * rng.random())
        if token == 0:
            break
    child.bounds.append(len(child.tokens))
    return child


def between(text: int | str, rng: random.Random) -> int:
    low, *high = map(int, str(text).split("-"))
    return rng.randint(low, high[0]) if high else low


def soft(scores: list[float], temperature: float) -> list[float]:
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def divide(budget: int, paths: list[Path], config: SamplingConfig) -> list[int]:
    policy, n = config.allocation.policy, len(paths)
    if policy == "average":
        shares = [budget // n] * n
        shares[-1] += budget % n
        return shares
    sign = {"low": -1, "high": 1}[policy.split("_")[0]]
    scores = []
    for path in paths:
        values = path.log_probs[-config.segment_tokens :] if policy.endswith("last") else path.log_probs
        scores.append(sign * (sum(values) if policy.endswith("sum") else sum(values) / len(values)))
    exact = [weight * (budget - n) for weight in soft(scores, config.allocation.temperature)]
    shares = [1 + int(share) for share in exact]
    by_remainder = sorted(range(n), key=lambda i: int(exact[i]) - exact[i])
    for index in by_remainder[: budget - sum(shares)]:
        shares[index] += 1
    return shares


def gumbel_order(weights: list[float], rng: random.Random) -> list[int]:
    keys = [math.log(weight) - math.log(-math.log(rng.random())) for weight in weights]
    return sorted(range(len(weights)), key=lambda i: -keys[i])


def leaf_order(leaves: list[Path], config: SamplingConfig, rng: random.Random) -> list[int]:
    priority = {"boxed": 7, "eos": 5, "depth": 4, "limit": 3, "repetition": 2}
    window = config.fallback.window_tokens or config.segment_tokens
    everyone = list(range(len(leaves)))
    match config.fallback.order:
        case "finished_strict":
            return sorted(everyone, key=lambda i: -priority[leaves[i].stop])
        case "finished":
            return gumbel_order([priority[leaf.stop] for leaf in leaves], rng)
        case "longer":
            return gumbel_order([len(leaf.tokens) for leaf in leaves], rng)
        case "wrong":
            everyone = [i for i in everyone if not right(np.array(leaves[i].tokens))]
        case "boxed_or_eos":
            everyone = [i for i in everyone if leaves[i].stop in ("boxed", "eos")]
        case "boxed_long":
            least = (config.fallback.min_windows or 0) * window
            everyone = [i for i in everyone if leaves[i].stop == "boxed" and len(leaves[i].tokens) >= least]
    rng.shuffle(everyone)
    return everyone


def pivot(leaf: Path, leaves: list[Path], rng: random.Random) -> int:
    places, weights = [], []
    for place in leaf.bounds[:-1]:
        below = [
            right(np.array(each.tokens)) for each in leaves if each.tokens[:place] == leaf.tokens[:place]
        ]
        places.append(place)
        weights.append(place * (sum(below) + 1) / (len(below) + 2))
    return rng.choices(places, weights)[0] if places else 0


def cut_of(leaf: Path, leaves: list[Path], config: SamplingConfig, rng: random.Random) -> int:
    rule, length = config.fallback, len(leaf.tokens)
    window = rule.window_tokens or config.segment_tokens
    if length < (rule.window_tokens or 0) or rule.cut == "from_start":
        return 0
    if rule.cut == "random":
        windows = math.ceil(length / window)
        cut = (windows - rng.randint(1, min(windows, rule.max_windows or windows))) * window
    elif rule.cut == "pivot":
        cut = pivot(leaf, leaves, rng)
    elif rule.cut == "min_log_prob":
        cut = leaf.log_probs.index(min(leaf.log_probs))
    else:
        size, sign = rule.block_tokens, 1 if rule.cut == "inverse_block" else -1
        blocks = [leaf.log_probs[i : i + size] for i in range(0, length, size)]
        weights = soft([sign * sum(block) / len(block) for block in blocks], 1.0)
        cut = size * rng.choices(range(len(blocks)), weights)[0]
    cut = min(cut, (config.max_depth - 1) * config.segment_tokens)
    return max([b for b in leaf.bounds if b <= cut], default=0) if rule.aligned else cut


def branch_place(path: Path, config: SamplingConfig) -> int:
    """Tokens of a path's response that its further children share with it."""
    if config.branch.at == "end":
        return len(path.tokens)
    start = path.bounds[-2] if len(path.bounds) > 1 else 0
    size = min(config.branch.window_tokens, len(path.tokens) - start)
    windows = range(start, len(path.tokens) - size + 1)
    return min(windows, key=lambda at: sum(path.log_probs[at : at + size]))


def branches(
    active: list[Path], finished_now: int, leaves: list[Path], config: SamplingConfig, rng: random.Random
) -> list[Path]:
    """The paths of the next step."""
    deep = [p for p in active if math.ceil(len(p.tokens) / config.segment_tokens) >= config.branch.from_depth]
    n, queue = len(deep), [path for path in active if path not in deep]
    if not deep:
        return queue
    rest = max(bound_of(leaves, active, config) - len(leaves) - len(queue), 0)
    wanted = factor(config, rng) if config.budget == "tokens" else factor(config, rng) * (n + finished_now)
    if config.mode == "sequential":
        wanted = n
    for path, share in zip(deep, divide(max(min(rest, wanted), n), deep, config), strict=True):
        place = branch_place(path, config)
        if share > 1 and 0 < place < len(path.tokens):
            path.bounds = sorted({*path.bounds, place})
        queue += [path] * share if place == len(path.tokens) else [path] + [path.cut(place)] * (share - 1)
        path.branched = share > 1
    return queue


def bound_of(leaves: list[Path], active: list[Path], config: SamplingConfig) -> int:
    if config.tree_response_tokens is None:
        return config.most_leaves
    left = max(0, config.tree_response_tokens - sum(len(leaf.tokens) for leaf in leaves))
    one = (
        sum(len(path.tokens) for path in active) / len(active) + config.segment_tokens
        if active
        else sum(len(leaf.tokens) for leaf in leaves) / len(leaves)
    )
    return min(config.most_leaves, max(config.min_width, len(leaves) + math.floor(left / one)))


def factor(config: SamplingConfig, rng: random.Random) -> int:
    per_step = config.tokens_per_step
    return between(config.branching, rng) if per_step is None else per_step // config.segment_tokens


def continuations(leaves: list[Path], rest: int, config: SamplingConfig, rng: random.Random) -> list[Path]:
    queue: list[Path] = []
    for index in leaf_order(leaves, config, rng) or [-1]:
        start = Path() if index < 0 else leaves[index].cut(cut_of(leaves[index], leaves, config, rng))
        queue += [start] * min(rest - len(queue), factor(config, rng))
        if config.fallback.cut == "from_start":
            break
    return queue


def distinct(children: list[tuple[Path, Path]], config: SamplingConfig) -> list[tuple[Path, Path]]:
    """The children that go on after a lookahead, each with its parent; siblings have one parent object."""
    if config.branch.lookahead is None or config.mode == "sequential":
        return children
    kept = {}
    for parent, child in children:
        begun = child.tokens[len(parent.tokens) :][: config.branch.lookahead]
        kept.setdefault((id(parent), tuple(begun)), (parent, child))
    return list(kept.values())


def simulate(config: SamplingConfig, chances: Chances, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    leaves: list[Path] = []
    first = between(config.initial_branching, rng)
    if config.tree_response_tokens is not None and isinstance(config.initial_branching, str):
        first = min(first, config.tree_response_tokens // config.segment_tokens)
    if config.tokens_per_step is not None:
        first = min(config.most_leaves, factor(config, rng))
    queue = [Path()] * (config.most_leaves if config.mode == "sequential" else first)
    while queue:
        active, before = [], len(leaves)
        for path, child in distinct([(p, sample_segment(p, chances, config, rng)) for p in queue], config):
            seen["unique tokens"] += len(child.tokens) - len(path.tokens)
            child.stop = why_it_ends(child, config)
            (leaves if child.stop else active).append(child)
        if active:
            queue = branches(active, len(leaves) - before, leaves, config, rng)
            seen["branchings"] += sum(path.branched for path in active)
            continue
        queue = []
        rest = bound_of(leaves, [], config) - len(leaves)
        if rest > 0 and config.fallback.cut != "none":
            seen["fallbacks"] += 1
            queue = continuations(leaves, rest, config, rng)
    for leaf in leaves:
        seen["leaves"] += 1
        seen["right"] += right(np.array(leaf.tokens))
        seen["total tokens"] += len(leaf.tokens)
        seen["segments"] += math.ceil(len(leaf.tokens) / config.segment_tokens)
        seen[leaf.stop] += 1
    return seen


def grow(config: SamplingConfig, rule: StopRule, engine: FakeEngine, index: int) -> GrowingTree:
    tree = GrowingTree(Prompt(str(index), prompt_tokens(index), "", "", ""), config, rule, seed=3, step=0)
    while tree.path_requests:
        for path in tree.path_requests:
            while not path.complete:
                tree.receive(path, engine.answer(tree.generate_request(path)))
            if path.stop is not None:
                tree.grade(path, FakeGrader().verdict(path.context[len(tree.prompt.tokens) :]))
        tree.advance()
    return tree


def summary(tree: GrowingTree, config: SamplingConfig) -> Counter[str]:
    whole = tree.finished()
    seen = Counter(leaf.stop.value for leaf in whole.leaves)
    seen["unique tokens"] = whole.unique_tokens()
    seen["total tokens"] = whole.total_tokens()
    seen["branchings"], seen["fallbacks"] = tree.branchings, tree.fallbacks
    seen["leaves"] = len(whole.leaves)
    seen["right"] = sum(right(whole.response(leaf)) for leaf in whole.leaves)
    seen["segments"] = sum(
        math.ceil(len(whole.response(leaf)) / config.segment_tokens) for leaf in whole.leaves
    )
    return seen


SMALL: dict[str, Any] = {
    "segment_tokens": 6,
    "max_depth": 5,
    "max_response_tokens": 30,
    "width": 8,
    "stops": {"repetition": {"check": "off"}},
}
LOOPING: dict[str, Any] = {"window_tokens": 2, "count": 3, "min_distinct": 1}
POLICIES: dict[str, dict[str, Any]] = {
    "paper": {},
    "initial range": {"initial_branching": "2-5"},
    "branching 3": {"branching": 3},
    "random budget": {"budget": "random", "branching": "1-3"},
    "token budget": {"budget": "tokens", "tokens_per_step": 20},
    "token cap": {"cap": "response_tokens", "tree_response_tokens": 70},
    "token cap, initial range": {
        "cap": "response_tokens",
        "tree_response_tokens": 20,
        "min_width": 4,
        "initial_branching": "2-8",
    },
    "token cap, min width": {"cap": "response_tokens", "tree_response_tokens": 40, "min_width": 4},
    **{
        f"allocation {policy}": {
            "allocation": {"policy": policy, "temperature": 0.3},
            "branching": 3,
            "width": 12,
        }
        for policy in ("low_sum", "high_sum", "low_mean", "high_mean", "low_last", "high_last")
    },
    "late": {"branch": {"from_depth": 3}},
    "late, branching 3": {"branch": {"from_depth": 2}, "branching": 3, "initial_branching": 3},
    "surprise": {"branch": {"at": "surprise"}},
    "late surprise in windows": {
        "branch": {"at": "surprise", "window_tokens": 3, "from_depth": 2},
        "allocation": {"policy": "low_last"},
    },
    "lookahead": {"branch": {"lookahead": 1}, "branching": 3, "initial_branching": 4},
    "lookahead, late surprise": {
        "branch": {"lookahead": 2, "at": "surprise", "from_depth": 2},
        "branching": 4,
    },
    "boxed with eos": {"stops": {"boxed": "with_eos", "repetition": {"check": "off"}}},
    "boxed off": {"stops": {"boxed": "off", "repetition": {"check": "off"}}},
    "repetition first": {"stops": {"repetition": {**LOOPING, "check": "first"}}},
    "repetition last": {"stops": {"repetition": {**LOOPING, "check": "last"}}},
    "limit before depth": {"max_response_tokens": 20},
    **{
        f"order {order}": {"fallback": {"order": order}}
        for order in ("finished_strict", "finished", "random", "longer", "wrong")
    },
    "order boxed_long": {"fallback": {"order": "boxed_long", "min_windows": 2}},
    **{
        f"cut {cut}": {"fallback": {"cut": cut, "block_tokens": 4}}
        for cut in ("min_log_prob", "block", "inverse_block", "from_start", "none", "pivot")
    },
    **{
        f"cut {cut}, unaligned": {"fallback": {"cut": cut, "block_tokens": 4, "aligned": False}}
        for cut in ("min_log_prob", "block", "inverse_block")
    },
    "cut random, unaligned": {"fallback": {"window_tokens": 4, "aligned": False}},
    "cut random, last windows": {"fallback": {"max_windows": 2}},
    "pivots": {"fallback": {"order": "wrong", "cut": "pivot"}, "initial_branching": 3, "width": 14},
    "sequential": {"mode": "sequential"},
}


def test_every_registered_policy_is_simulated() -> None:
    configs = [SamplingConfig(**{**SMALL, **policy}) for policy in POLICIES.values()]
    assert {config.budget for config in configs} == set(BUDGETS)
    assert {config.allocation.policy for config in configs} == set(ALLOCATIONS)
    assert {config.branch.at for config in configs} == set(PLACES)
    assert {config.fallback.order for config in configs} == set(ORDERS)
    assert {config.fallback.cut for config in configs} == {*CUTS, "none"}


# A few trees find large faults, many trees find small ones.
@pytest.mark.parametrize("trees", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", POLICIES)
def test_trees_are_those_of_the_straight_line_rules(policy: str, trees: int) -> None:
    config = SamplingConfig(**{**SMALL, **POLICIES[policy]})
    few = policy.startswith(("repetition", "lookahead"))
    chances = Chances(letters=3) if few else Chances()
    rng = random.Random(policy)
    rule = StopRule(config, decode)
    engine = FakeEngine(chances.end, chances.box, letters=chances.letters - 1)
    ours = [summary(grow(config, rule, engine, index), config) for index in range(trees)]
    theirs = [simulate(config, chances, rng) for _ in range(trees)]
    names = {name for counts in ours + theirs for name in counts}
    for name in sorted(names):
        a = np.array([counts[name] for counts in ours], dtype=float)
        b = np.array([counts[name] for counts in theirs], dtype=float)
        # Two means over independent trees: five standard errors are exceeded once in two million.
        allowed = 5 * math.sqrt((a.var() + b.var()) / trees) + 1e-9
        assert abs(a.mean() - b.mean()) <= allowed, (
            f"{name}: {a.mean():.4f} and {b.mean():.4f} ± {allowed:.4f}"
        )


def share_of_prompt(tree: Tree) -> list[float]:
    """Of each leaf, the product of 1 / children along its path: the chance of a random walk to it."""
    children = Counter(segment.parent for segment in tree.segments)
    return [
        math.prod(1 / children[tree.segments[index].parent] for index in tree.path(leaf.segment))
        for leaf in tree.leaves
    ]


@pytest.mark.parametrize("end", [0.1, 0.05])
@pytest.mark.parametrize("cut", ["none", "random"])
def test_budget_transfer_favours_long_responses_and_the_shares_undo_it(cut: str, end: float) -> None:
    """TreePO's leaves are not a sample of the policy's responses, but weighted by their share they are.

    Exactly so without fallback, because children are chosen before they are sampled. These are the rows in
    docs/sampling.md.
    """
    settings = {**SMALL, "width": 16, "max_depth": 20, "max_response_tokens": 120, "fallback": {"cut": cut}}
    config = SamplingConfig.model_validate(settings)
    rule, engine = StopRule(config, decode), FakeEngine(end)
    trees = [grow(config, rule, engine, index).finished() for index in range(200)]
    plain, weighted = [], []
    for tree in trees:
        short = np.array([len(tree.response(leaf)) <= config.segment_tokens for leaf in tree.leaves])
        plain.append(short.mean())
        weighted.append(np.dot(short, share_of_prompt(tree)))
    truth = 1 - (1 - end) ** config.segment_tokens
    error = float(np.std(weighted)) / math.sqrt(len(trees))
    if cut == "none":
        assert np.mean(weighted) == pytest.approx(truth, abs=5 * error)  # five standard errors of a mean
    # Much nearer: the plain mean is off by 0.16 to 0.37, about ten standard errors.
    assert abs(np.mean(weighted) - truth) < abs(np.mean(plain) - truth) / 2
    assert np.mean(plain) < truth - 0.1
