"""Health rules: what is wrong with a run, from the metrics of its steps. Each warns once, with the reason and
the remedy.

A rule is a pure function of a `History` and the configuration; it returns its line, or None. A new one is
decorated with `@rule`, and gets a row in docs/following.md.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from treepo.config.run import RunConfig
from treepo.rewards.extraction import BOXED

type Metrics = Mapping[str, float | None]
type Rule = Callable[["History", RunConfig], str | None]

RULES: dict[str, Rule] = {}
"""Every health rule by name."""
_FIRST, _LAST = 5, 20  # steps that are kept
_FEW, _SOME = 3, 5  # steps in a row that a rule asks for
_GROWTH = 2.0  # of the log-prob difference over the steps that are kept
_ROUNDING = 0.01  # a mean log-prob difference that bfloat16 alone explains
_COLLAPSE = 0.1  # entropy, as a share of the first steps'
_SOLVED = 0.9  # accuracy at which a low entropy is what training is for
_SLOWER = 1.5  # seconds of a step, against the first steps and the growth of the answers
_SECONDS_SLOWER = 1.0  # of each step, below which a slower one is of no interest


def rule(function: Rule) -> Rule:
    """Make the function a health rule under its own name."""
    RULES[function.__name__] = function
    return function


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """What a rule says of a run. step: the last one that it has seen."""

    rule: str
    step: int
    text: str


@dataclass(frozen=True, slots=True)
class History:
    """The metrics of a run's first steps, and of its newest, in order. None and nan are numbers that no
    step had.
    """

    first: Sequence[Metrics]
    last: Sequence[Metrics]

    def newest(self, name: str, steps: int) -> list[float]:
        """The numbers of the newest steps; empty unless every one of them has it."""
        return _numbers(self.last[-steps:], name, steps)

    def each(self, name: str, steps: int, holds: Callable[[float], bool]) -> bool:
        """Whether the number holds in each of the newest steps."""
        found = self.newest(name, steps)
        return bool(found) and all(map(holds, found))

    def typical(self, name: str) -> tuple[float, float] | None:
        """The medians of the first and of the newest steps; None unless they are different steps."""
        first, last = _numbers(self.first, name, _FIRST), self.newest(name, _SOME)
        if not first or not last or len(self.last) < _FIRST + _SOME:
            return None
        return statistics.median(first), statistics.median(last)


def _numbers(steps: Sequence[Metrics], name: str, number: int) -> list[float]:
    values = [value for step in steps if (value := step.get(name)) is not None and math.isfinite(value)]
    return values if len(values) == number else []


class Health:
    """Applies the rules after each step of a run. warnings: what they have said so far, in order."""

    def __init__(self, config: RunConfig, earlier: Iterable[Metrics] = ()) -> None:
        """earlier: the lines of metrics.jsonl before a resume."""
        self.warnings: list[HealthWarning] = []
        self._config = config
        self._first: list[Metrics] = []
        self._last: deque[Metrics] = deque(maxlen=_LAST)
        for metrics in earlier:
            if "seconds/step" in metrics:  # else it is an evaluation
                self.step(_step(metrics), metrics)

    def step(self, step: int, metrics: Metrics) -> list[HealthWarning]:
        """The new warnings after a step. A step that is repeated replaces what is known of it and of later
        ones; what was said is not said again.
        """
        known = {**metrics, "step": step}
        self._last = deque((*(one for one in self._last if _step(one) < step), known), maxlen=_LAST)
        self._first = [*(one for one in self._first if _step(one) < step), known][:_FIRST]
        history = History(self._first, list(self._last))
        said = {warning.rule for warning in self.warnings}
        found = [
            HealthWarning(name, step, text)
            for name, check in RULES.items()
            if name not in said and (text := check(history, self._config)) is not None
        ]
        self.warnings += found
        return found


def _step(metrics: Metrics) -> int:
    step = metrics["step"]
    assert step is not None
    return int(step)


@rule
def no_signal(history: History, config: RunConfig) -> str | None:
    """In 5 steps no prompt had two answers with different rewards."""
    del config
    if not history.each("trees/informative", _SOME, lambda share: share == 0):
        return None
    found = history.newest("accuracy", 1)
    why = "the prompts are too easy or too hard, or the reward is constant"
    if found and found[0] == 0:
        why = "no answer is correct: take easier prompts, or ask for the format in data.system_prompt"
    elif found and found[0] == 1:
        why = "every answer is correct: the prompts are too easy by now"
    return f"for {_SOME} steps no prompt had two answers with different rewards, so nothing is learned; {why}"


@rule
def truncated(history: History, config: RunConfig) -> str | None:
    """In 3 steps a limit ended at least 95% of the answers."""
    limit, depth = history.newest("stop/limit", _FEW), history.newest("stop/depth", _FEW)
    if not limit or not depth or min(map(sum, zip(limit, depth, strict=True))) < 0.95:
        return None
    sampling = config.sampling
    key = "sampling.max_response_tokens"
    if sum(depth) > sum(limit):
        key = f"sampling.max_depth (now {sampling.max_depth}) or sampling.segment_tokens"
    return (
        f"for {_FEW} steps nearly all answers were cut off after {sampling.longest_response} tokens; raise "
        f"{key}, or ask for short answers in data.system_prompt"
    )


@rule
def no_answer(history: History, config: RunConfig) -> str | None:
    """In 3 steps the grader found no answer in at least 80% of the responses."""
    if not history.each("verdict/no_answer", _FEW, lambda share: share >= 0.8):
        return None
    share = history.newest("verdict/no_answer", 1)[0]
    return (
        f"for {_FEW} steps most responses had no answer that could be extracted ({share:.0%} of the last); "
        f"{_answer_remedy(config)}"
    )


def _answer_remedy(config: RunConfig) -> str:
    """reward.answer is for math-verify; its default takes boxes alone."""
    reward = config.reward
    if reward.function is None and reward.url is None and reward.answer == BOXED:
        return (
            "ask for a boxed answer in data.system_prompt, or set reward.answer: boxed_or_last, which also "
            "takes an answer in prose"
        )
    return "ask for the answer's format in data.system_prompt, and see what the model writes in trees.jsonl"


@rule
def log_prob_difference(history: History, config: RunConfig) -> str | None:
    """The mean log-prob difference has doubled within 20 steps, and is over 0.01."""
    del config
    found = history.newest("logprob_difference_mean", _LAST)
    if not found:
        return None
    before, now = statistics.median(found[:_SOME]), statistics.median(found[-_SOME:])
    if now < _ROUNDING or now < _GROWTH * before:
        return None
    return (
        f"the log-probs of engines and trainer differ more and more: on average by {before:.2g} {_LAST} "
        f"steps ago, by {now:.2g} now; lower trainer.optimizer.learning_rate, or correct it with "
        "learning.importance"
    )


@rule
def entropy_collapse(history: History, config: RunConfig) -> str | None:
    """The entropy is below a tenth of the first steps', with an accuracy below 0.9."""
    entropy, accuracy = history.typical("train/entropy"), history.typical("accuracy")
    if entropy is None or accuracy is None:
        return None
    before, now = entropy
    if now >= _COLLAPSE * before or accuracy[1] >= _SOLVED:
        return None
    bound = config.learning.loss_options.get("clip_high")
    clip = "" if bound is None else f"learning.clip_high (now {bound:g}) or "
    return (
        f"the entropy has collapsed from {before:.2g} to {now:.2g} at an accuracy of {accuracy[1]:.2f}: all "
        f"answers become the same; raise {clip}learning.entropy_coefficient, or lower "
        "trainer.optimizer.learning_rate"
    )


@rule
def fallbacks(history: History, config: RunConfig) -> str | None:
    """In 3 steps at least 80% of the places where a tree grew wider were fallback cuts."""
    if config.sampling.mode != "tree" or config.sampling.branching == 1:
        return None
    cuts, branchings = history.newest("rollout/fallbacks", _FEW), history.newest("rollout/branchings", _FEW)
    if not cuts or not branchings or not all(map(sum, zip(cuts, branchings, strict=True))):
        return None
    share = min(cut / (cut + branching) for cut, branching in zip(cuts, branchings, strict=True))
    if share < 0.8:
        return None
    return (
        f"for {_FEW} steps trees grew wider by fallback cuts, and hardly by branching: answers end before "
        f"they branch; lower sampling.segment_tokens (now {config.sampling.segment_tokens}), or raise "
        "sampling.initial_branching"
    )


@rule
def little_sharing(history: History, config: RunConfig) -> str | None:
    """In 3 steps the trees had less than 5% of their tokens in common."""
    if config.sampling.mode != "tree" or config.sampling.width == 1:
        return None
    if not history.each("total_over_unique", _FEW, lambda ratio: ratio < 1.05):
        return None
    return (
        f"for {_FEW} steps answers to a prompt shared hardly any token (total_over_unique is "
        f"{history.newest('total_over_unique', 1)[0]:.2f}), so trees save nothing; lower "
        f"sampling.segment_tokens (now {config.sampling.segment_tokens}) or sampling.initial_branching"
    )


@rule
def grader_timeouts(history: History, config: RunConfig) -> str | None:
    """In 3 steps at least 2% of the answers met the grader's deadline."""
    if not history.each("verdict/timeout", _FEW, lambda share: share >= 0.02):
        return None
    return (
        f"for {_FEW} steps graders timed out ({history.newest('verdict/timeout', 1)[0]:.0%} of the last "
        "answers, which are masked); raise reward.deadline_seconds (now "
        f"{config.reward.deadline_seconds:g}), or have no more reward.workers (now {config.reward.workers}) "
        "than cores"
    )


@rule
def grader_errors(history: History, config: RunConfig) -> str | None:
    """In 3 steps the grader failed on at least 2% of the answers."""
    del config
    if not history.each("verdict/error", _FEW, lambda share: share >= 0.02):
        return None
    return (
        f"for {_FEW} steps graders failed ({history.newest('verdict/error', 1)[0]:.0%} of the last answers, "
        "which are masked); log.txt has their errors"
    )


@rule
def few_tokens_teach(history: History, config: RunConfig) -> str | None:
    """In 3 steps the importance weights left fewer than 30% effective samples."""
    if not history.each("train/effective_sample_share", _FEW, lambda share: share < 0.3):
        return None
    share = history.newest("train/effective_sample_share", 1)[0]
    remedy = "lower loop.max_staleness" if config.loop.mode == "async" else "see the log-prob difference"
    return (
        f"for {_FEW} steps importance weights were so uneven that only {share:.0%} of the tokens teach; "
        f"{remedy}, or widen the bounds of learning.importance"
    )


@rule
def slower(history: History, config: RunConfig) -> str | None:
    """Steps take 1.5 times as long as the first ones, beyond the growth of the answers."""
    del config
    seconds, tokens = history.typical("seconds/step"), history.typical("tokens_unique")
    if seconds is None or tokens is None:
        return None
    before, now = seconds
    if now < before + _SECONDS_SLOWER or now / before < _SLOWER * max(tokens[1] / max(tokens[0], 1.0), 1.0):
        return None
    return (
        f"steps have become slower: {now:.0f} s each, against {before:.0f} s at first, and the answers have "
        "not grown as much; compare the phases (seconds/...) and what else runs on this machine"
    )
