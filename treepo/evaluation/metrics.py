# ruff: noqa: N815 - the suffix names the dimension (CONTRIBUTING.md)
"""Scores of an evaluation: mean@n, pass@k, maj@k, and their intervals over problems.

docs/evaluation.md has the definitions. A response that could not be graded (`timeout`, `error`) is in no
denominator; a problem counts for a metric if it has the graded responses that the metric needs. Votes are
cast by answers that are mathematically equal (treepo.rewards.voting), not by strings as in the official code.

Suffixes: `_L` one value a response (a leaf), `_P` a problem.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.rewards.voting import NO_VOTE
from treepo.rollout import rng
from treepo.tree import Stop, Verdict

RESAMPLES = 1000
"""Of every bootstrap; the official evaluation's number."""
LEVEL = 0.95
"""Of the intervals."""
_RESAMPLES_AT_ONCE = 100  # a divisor of RESAMPLES; all at once would be gigabytes for a large benchmark
TRUNCATED = (Stop.LIMIT, Stop.DEPTH)


def evaluation_sampling(config: RunConfig) -> SamplingConfig:
    """The training's lengths and stops, but independent samples at the evaluation's temperature."""
    return config.sampling.model_copy(
        update={
            "mode": "sequential",
            "width": config.evaluation.samples,
            "temperature": config.evaluation.temperature,
        }
    )


@dataclass(frozen=True)
class ProblemResult:
    """One problem's graded responses.

    classes_L: equal numbers where answers are equal, `NO_VOTE` for a response that casts no vote.
    weights_L: the inverse of branching above each leaf, of any scale; all equal for independent samples.
    tokens_L: of each response. unique_tokens: a shared one once.
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
        """Share of the graded responses that are correct; nan where there are none."""
        return self.correct / self.graded if self.graded else math.nan

    def weighted_mean(self) -> float:
        """The same, each response counted by its weight."""
        pairs = [
            (weight, verdict is Verdict.CORRECT)
            for weight, verdict in zip(self.weights_L, self.verdicts_L, strict=True)
            if verdict.graded
        ]
        total = sum(weight for weight, _ in pairs)
        return sum(weight for weight, correct in pairs if correct) / total if total else math.nan

    def pass_at(self, k: int) -> float:
        """Chance that k of the graded responses, drawn without replacement, hold a correct one.

        1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1); nan where fewer than k are graded.
        """
        if self.graded < k:
            return math.nan
        return 1.0 - math.comb(self.graded - self.correct, k) / math.comb(self.graded, k)

    def majority(self) -> float:
        """Chance that the answer with most votes among all graded responses is correct."""
        votes_C, correct_C = self._votes()
        return float(_winner_is_correct(votes_C[None, :-1], correct_C)[0]) if self.graded else math.nan

    def majority_at(self, k: int, seed: int) -> float:
        """The same for k of the graded responses, drawn without replacement, over `RESAMPLES` draws.

        So it estimates the vote of k responses without bias, as `pass_at` does. The draws belong to (seed,
        problem, k), whatever else is evaluated. nan where fewer than k are graded.
        """
        if self.graded <= k:
            return self.majority() if self.graded == k else math.nan
        votes_C, correct_C = self._votes()
        generator = rng.generator("maj", seed, self.id, k)
        drawn = generator.multivariate_hypergeometric(votes_C, k, size=RESAMPLES)
        return float(_winner_is_correct(drawn[:, :-1], correct_C).mean())

    def majority_bootstrap(self, seed: int) -> float:
        """The vote of as many responses as are graded, drawn with replacement: the official evaluation's.

        Lower than `majority` where votes are spread, as a lone wrong answer may be drawn several times.
        """
        if not self.graded:
            return math.nan
        votes_C, correct_C = self._votes()
        generator = rng.generator("maj bootstrap", seed, self.id)
        drawn = generator.multinomial(self.graded, votes_C / self.graded, size=RESAMPLES)
        return float(_winner_is_correct(drawn[:, :-1], correct_C).mean())

    def _votes(self) -> tuple[np.ndarray, np.ndarray]:
        """Votes for each class, last those that voted for none: [C + 1]; which classes are correct: [C]."""
        graded = [
            (number, verdict is Verdict.CORRECT)
            for number, verdict in zip(self.classes_L, self.verdicts_L, strict=True)
            if verdict.graded
        ]
        numbers = sorted({number for number, _ in graded if number != NO_VOTE})
        votes = [sum(number == wanted for number, _ in graded) for wanted in numbers]
        right = {number for number, correct in graded if correct}
        votes_C = np.array([*votes, len(graded) - sum(votes)], dtype=np.int64)
        return votes_C, np.array([number in right for number in numbers], dtype=bool)


def _winner_is_correct(votes: np.ndarray, correct_C: np.ndarray) -> np.ndarray:
    """For each draw the chance that the winner is correct: float64 [D] of votes [D, C].

    Classes that tie for the most votes are equally likely to win; without any vote nothing is right.
    """
    if not len(correct_C):
        return np.zeros(len(votes))
    most = votes.max(axis=1, keepdims=True)
    ahead = (votes == most) & (most > 0)
    return (ahead & correct_C).sum(axis=1) / np.maximum(ahead.sum(axis=1), 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its interval; nan without any problem. problems: those that count."""

    value: float
    low: float
    high: float
    problems: int


def estimate(strata: Sequence[np.ndarray], seed: int) -> Estimate:
    """The mean over all problems of all strata (benchmarks), weighted by size: of float64 [P] each.

    Values that are nan are left out. The interval is the percentile bootstrap over problems, a problem's
    responses kept together, each benchmark resampled to its own size.
    """
    (only,) = _estimates([values[:, None] for values in strata], seed)
    return only


def estimates(metrics_P: Sequence[Sequence[Mapping[str, float]]], seed: int) -> dict[str, Estimate]:
    """Each metric's `estimate` over the problems of one or more benchmarks."""
    names = next((list(problem) for benchmark in metrics_P for problem in benchmark), [])
    if not names:
        return {}
    strata = [
        np.array([[problem[name] for name in names] for problem in benchmark]).reshape(-1, len(names))
        for benchmark in metrics_P
    ]
    return dict(zip(names, _estimates(strata, seed), strict=True))


def _estimates(strata: Sequence[np.ndarray], seed: int) -> list[Estimate]:
    """Of several metrics, with the same resamples for all of them: float64 [P, M] for each benchmark."""
    generator = rng.generator("interval", seed)
    metrics = strata[0].shape[1]
    total, drawn, drawn_count = 0.0, np.zeros((RESAMPLES, metrics)), np.zeros((RESAMPLES, metrics))
    count = np.zeros(metrics, dtype=np.int64)
    for values in strata:
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
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sample_counts(n: int) -> list[int]:
    """The k of pass@k and maj@k: 1, 2, 4, ... up to n, and n."""
    powers = [2**exponent for exponent in range(n.bit_length())]
    return powers if powers[-1] == n else [*powers, n]


def problem_metrics(problem: ProblemResult, samples: int, seed: int, *, voting: bool) -> dict[str, float]:
    """Every metric of one problem, nan where it has none.

    samples: the responses that were asked for. voting: whether answers were extracted at all.
    """
    ks = sample_counts(samples)
    metrics = {"mean": problem.mean(), "weighted_mean": problem.weighted_mean()}
    metrics |= {f"pass@{k}": problem.pass_at(k) for k in ks}
    if voting:
        metrics |= {"majority": problem.majority(), "majority_bootstrap": problem.majority_bootstrap(seed)}
        metrics |= {f"maj@{k}": problem.majority_at(k, seed) for k in ks if k > 1}
    return metrics


def length_metrics(problems: Sequence[ProblemResult]) -> dict[str, float | None]:
    """Response tokens over all responses, and the share cut off by the limit or the depth."""
    tokens = np.array([tokens for problem in problems for tokens in problem.tokens_L])
    stops = [stop for problem in problems for stop in problem.stops_L]
    if not len(tokens):
        return dict.fromkeys(("mean", "median", "p95", "max", "truncated"), None)
    return {
        "mean": float(tokens.mean()),
        "median": float(np.median(tokens)),
        "p95": float(np.quantile(tokens, 0.95)),
        "max": int(tokens.max()),
        "truncated": sum(stop in TRUNCATED for stop in stops) / len(stops),
    }
