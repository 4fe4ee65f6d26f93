# ruff: noqa: N815 - the suffix names the dimension (CONTRIBUTING.md)
"""Scores of an evaluation: mean@n, pass@k, maj@k, and their intervals over problems.

docs/evaluation.md defines them. A response that could not be graded (`timeout`, `error`) counts in no
denominator, and a problem counts for a metric only if it has enough graded responses. Answers vote together
if they are mathematically equal (treepo.rewards.voting); the official code compares strings.

The suffix `_L` stands for a problem's responses (leaves).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from treepo.rewards.voting import NO_VOTE
from treepo.rollout import rng
from treepo.tree import Stop, Verdict

RESAMPLES = 1000
"""Draws of every bootstrap, as in the official evaluation."""
_LEVEL = 0.95  # of the intervals
_RESAMPLES_AT_ONCE = 100  # divides RESAMPLES; all at once would take gigabytes for a large benchmark
_TRUNCATED = (Stop.LIMIT, Stop.DEPTH)


@dataclass(frozen=True)
class ProblemResult:
    """One problem's responses and their verdicts.

    classes_L: responses with equal numbers have equal answers; `NO_VOTE` for a response without a vote.
    weights_L: the inverse of the branchings above each leaf, at any scale; all equal for independent samples.
    tokens_L: each response's length. unique_tokens: tokens in all, shared ones counted once.
    """

    benchmark: str
    id: str
    answer: str
    verdicts_L: tuple[Verdict, ...]
    classes_L: tuple[int, ...]
    weights_L: tuple[float, ...]
    tokens_L: tuple[int, ...]
    stops_L: tuple[Stop, ...]
    unique_tokens: int

    @cached_property
    def graded(self) -> int:
        return sum(verdict.graded for verdict in self.verdicts_L)

    @cached_property
    def correct(self) -> int:
        return sum(verdict is Verdict.CORRECT for verdict in self.verdicts_L)

    def mean(self) -> float:
        """Share of the graded responses that are correct; nan without graded responses."""
        return self.correct / self.graded if self.graded else math.nan

    def weighted_mean(self) -> float:
        """`mean` with each response counted by its weight."""
        pairs = [
            (weight, verdict is Verdict.CORRECT)
            for weight, verdict in zip(self.weights_L, self.verdicts_L, strict=True)
            if verdict.graded
        ]
        total = sum(weight for weight, _ in pairs)
        return sum(weight for weight, correct in pairs if correct) / total if total else math.nan

    def pass_at(self, k: int) -> float:
        """Probability that k of the graded responses, drawn without replacement, include a correct one.

        1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1); nan if fewer than k are graded.
        """
        if self.graded < k:
            return math.nan
        return 1.0 - math.comb(self.graded - self.correct, k) / math.comb(self.graded, k)

    def majority(self) -> float:
        """Probability that the answer with most votes of the graded responses is correct; ties are drawn."""
        votes, correct = self._votes()
        return float(_winner_is_correct(votes[None, :-1], correct)[0]) if self.graded else math.nan

    def majority_at(self, k: int, seed: int) -> float:
        """`majority` of k of the graded responses drawn without replacement, averaged over `RESAMPLES` draws.

        Like `pass_at`, an unbiased estimate for k responses. The draws depend on (seed, problem, k) only, not
        on other problems. nan if fewer than k are graded.
        """
        if self.graded <= k:
            return self.majority() if self.graded == k else math.nan
        votes, correct = self._votes()
        generator = rng.generator("maj", seed, self.id, k)
        drawn = generator.multivariate_hypergeometric(votes, k, size=RESAMPLES)
        return float(_winner_is_correct(drawn[:, :-1], correct).mean())

    def majority_bootstrap(self, seed: int) -> float:
        """`majority` of n responses drawn with replacement from the n graded ones, as in the official
        evaluation.

        It is lower than `majority` if votes are spread, because a lone wrong answer may be drawn several
        times.
        """
        if not self.graded:
            return math.nan
        votes, correct = self._votes()
        generator = rng.generator("maj bootstrap", seed, self.id)
        drawn = generator.multinomial(self.graded, votes / self.graded, size=RESAMPLES)
        return float(_winner_is_correct(drawn[:, :-1], correct).mean())

    def _votes(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [C + 1]: votes for each of C answers, then the responses without a vote. bool [C]: which
        answers are correct.
        """
        graded = [
            (number, verdict is Verdict.CORRECT)
            for number, verdict in zip(self.classes_L, self.verdicts_L, strict=True)
            if verdict.graded
        ]
        numbers = sorted({number for number, _ in graded if number != NO_VOTE})
        votes = [sum(number == wanted for number, _ in graded) for wanted in numbers]
        right = {number for number, correct in graded if correct}
        counts = np.array([*votes, len(graded) - sum(votes)], dtype=np.int64)
        return counts, np.array([number in right for number in numbers], dtype=bool)


def _winner_is_correct(votes: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """float64 [D]: for each of D draws the probability that the winner is correct.

    votes: [D, C]. correct: [C]. Answers that tie for most votes are equally likely to win; without any vote
    the winner is wrong.
    """
    if not len(correct):
        return np.zeros(len(votes))
    most = votes.max(axis=1, keepdims=True)
    ahead = (votes == most) & (most > 0)
    return (ahead & correct).sum(axis=1) / np.maximum(ahead.sum(axis=1), 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its 95% interval; nan without any problem. problems: the number that count."""

    value: float
    low: float
    high: float
    problems: int


def estimate(benchmarks: Sequence[np.ndarray], seed: int) -> Estimate:
    """The mean of a metric over all problems of all benchmarks, so that each benchmark counts by its size.

    benchmarks: float64 [P] each; nan is left out. The interval is a percentile bootstrap over problems: a
    problem's responses stay together, and each benchmark is resampled to its own size.
    """
    (only,) = _estimates([values[:, None] for values in benchmarks], seed)
    return only


def estimates(benchmarks: Sequence[Sequence[Mapping[str, float]]], seed: int) -> dict[str, Estimate]:
    """The `estimate` of each metric. benchmarks: the metrics of each problem."""
    names = next((list(problem) for benchmark in benchmarks for problem in benchmark), [])
    if not names:
        return {}
    values = [
        np.array([[problem[name] for name in names] for problem in benchmark]).reshape(-1, len(names))
        for benchmark in benchmarks
    ]
    return dict(zip(names, _estimates(values, seed), strict=True))


def _estimates(benchmarks: Sequence[np.ndarray], seed: int) -> list[Estimate]:
    """Of M metrics, all with the same resamples. benchmarks: float64 [P, M] each."""
    generator = rng.generator("interval", seed)
    metrics = benchmarks[0].shape[1]
    total, drawn, drawn_count = 0.0, np.zeros((RESAMPLES, metrics)), np.zeros((RESAMPLES, metrics))
    count = np.zeros(metrics, dtype=np.int64)
    for values in benchmarks:
        known, problems = ~np.isnan(values), len(values)
        values = np.where(known, values, 0.0)
        total, count = total + values.sum(axis=0), count + known.sum(axis=0)
        for draw in range(0, RESAMPLES if problems else 0, _RESAMPLES_AT_ONCE):
            rows = slice(draw, draw + _RESAMPLES_AT_ONCE)
            times = generator.multinomial(problems, np.full(problems, 1 / problems), _RESAMPLES_AT_ONCE)
            drawn[rows] += times @ values
            drawn_count[rows] += times @ known
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as the mean of nothing should be
        mean, resampled = total / count, drawn / drawn_count
    return [
        Estimate(float(mean[metric]), *_interval(resampled[:, metric]), int(count[metric]))
        for metric in range(metrics)
    ]


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def sample_counts(n: int) -> list[int]:
    """The k of pass@k and maj@k: the powers of two up to n, and n."""
    powers = [2**exponent for exponent in range(n.bit_length())]
    return powers if powers[-1] == n else [*powers, n]


def problem_metrics(problem: ProblemResult, samples: int, seed: int, *, voting: bool) -> dict[str, float]:
    """Every metric of one problem, nan if it has too few graded responses.

    samples: the number of responses requested. voting: whether the grader extracted answers.
    """
    ks = sample_counts(samples)
    metrics = {"mean": problem.mean(), "weighted_mean": problem.weighted_mean()}
    metrics |= {f"pass@{k}": problem.pass_at(k) for k in ks}
    if voting:
        metrics |= {"majority": problem.majority(), "majority_bootstrap": problem.majority_bootstrap(seed)}
        metrics |= {f"maj@{k}": problem.majority_at(k, seed) for k in ks if k > 1}
    return metrics


def length_metrics(problems: Sequence[ProblemResult]) -> dict[str, float | None]:
    """Statistics of response lengths in tokens, and the share that a limit of tokens or depth cut off; None
    without responses.
    """
    tokens = np.array([tokens for problem in problems for tokens in problem.tokens_L])
    stops = [stop for problem in problems for stop in problem.stops_L]
    if not len(tokens):
        return dict.fromkeys(("mean", "median", "p95", "max", "truncated"), None)
    return {
        "mean": float(tokens.mean()),
        "median": float(np.median(tokens)),
        "p95": float(np.quantile(tokens, 0.95)),
        "max": int(tokens.max()),
        "truncated": sum(stop in _TRUNCATED for stop in stops) / len(stops),
    }
