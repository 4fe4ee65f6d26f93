"""Policy losses: one registered function each, chosen by name in `learning.loss`.

A loss is a function of a token's ratio r = policy / old policy, its logarithm l, and its advantage A. Given
r, every loss here is linear in A on either side of 0. A token that several leaves share therefore needs only
the sums of their positive and of their negative advantages, A+ and A-, and training it once is exact
(treepo.learning.loss).

`level` says which tokens have one ratio: each its own, or all tokens of a segment, or of a leaf's response,
the geometric mean of theirs. A level's gradient is that of GSPO-token (arXiv:2507.18071, section 4.3): a
token has the value of its level's ratio and the gradient of its own log-prob. A segment's ratio depends on
the segment alone, so leaves that share it agree on it. A leaf's does not: `gspo` needs packs of whole
trajectories.

Clips act on l, so that no ratio can overflow. This module does not import torch, so that the configuration
can read the names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # for the annotations alone
    from torch import Tensor

type Level = Literal["token", "segment", "leaf"]

_SATURATED = 20.0  # a log-ratio at which `sapo`'s gate is 1, and its gradient 0, in every float type


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a policy loss reads; each [T].

    log_ratio: log(policy / old policy) at the loss's level, 0 for an untrained token; has a gradient.
    advantage_pos, advantage_neg: A+ and A-. count_pos, count_neg: the weights of the leaves behind each.
    """

    log_ratio: Tensor
    advantage_pos: Tensor
    advantage_neg: Tensor
    count_pos: Tensor
    count_neg: Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """function: maps Tokens and the `options` to each token's loss [T], and to tensors [T] whose sums are
    metrics of that name.
    level: which tokens have one ratio.
    options: the keys of `learning` that `function` takes as keyword arguments, and their values if the
    configuration leaves them at null.
    """

    function: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    level: Level
    options: dict[str, float]


POLICY_LOSSES: dict[str, PolicyLoss] = {}


def register[**P](
    *, level: Level
) -> Callable[[Callable[P, tuple[Tensor, dict[str, Tensor]]]], Callable[P, tuple[Tensor, dict[str, Tensor]]]]:
    """Make the decorated function a value of `learning.loss`, under its own name.

    The function takes the Tokens and, as keyword-only arguments with a default, the keys of `learning` that
    it reads. A configuration that sets such a key for a loss that does not read it is an error.
    """

    def add(
        function: Callable[P, tuple[Tensor, dict[str, Tensor]]],
    ) -> Callable[P, tuple[Tensor, dict[str, Tensor]]]:
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        POLICY_LOSSES[function.__name__] = PolicyLoss(function, level, options)
        return function

    return add


@register(level="token")
def ppo(
    tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 10.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and at most -dual_clip A if A < 0.

    Source: arXiv:1707.06347; clip-higher of DAPO (arXiv:2503.14476); dual clip (arXiv:1912.09729).
    """
    low, high, dual = _log(1 - clip_low), math.log1p(clip_high), math.log(dual_clip)
    positive, negative = tokens.log_ratio.clamp(max=high), tokens.log_ratio.clamp(low, dual)
    value = tokens.log_ratio.detach()
    return -tokens.advantage_pos * positive.exp() - tokens.advantage_neg * negative.exp(), {
        "clip_high": tokens.count_pos * (value > high),
        "clip_low": tokens.count_neg * (value < low),
        "dual_clip": tokens.count_neg * (value > dual),
    }


@register(level="leaf")
def gspo(
    tokens: Tokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4, dual_clip: float = 10.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo` with one ratio a response: s = exp(mean of l over its trained tokens).

    With `normalisation: sequence_mean` it is the paper's objective; the bounds are the paper's.
    Source: arXiv:2507.18071, equations 5 to 7, its token variant for advantages that differ by token.
    """
    return ppo(tokens, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


@register(level="segment")
def segment_po(
    tokens: Tokens, *, clip_low: float = 0.02, clip_high: float = 0.03, dual_clip: float = 10.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo` with one ratio a segment: s = exp(mean of l over the segment's tokens). Ours.

    All leaves below a segment share its ratio, so a packed tree trains it exactly. Of a tree without branches
    and with one segment it is `gspo`; with one token a segment it is `ppo`. A mean over n tokens varies about
    sqrt(n) times less than one token's ratio, hence the narrower bounds.
    """
    return ppo(tokens, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


@register(level="token")
def cispo(
    tokens: Tokens, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A l: a clipped token keeps its gradient.

    sg: without gradient. l stands for the log-prob, from which it differs by a constant: the gradient is the
    same, and the loss is 0 at ratio 1. clip_low = 1 is no lower bound, as in the paper.
    Source: MiniMax-M1 (arXiv:2506.13585), equation 4.
    """
    low, high = _log(1 - clip_low), math.log1p(clip_high)
    value = tokens.log_ratio.detach()
    count, advantage = tokens.count_pos + tokens.count_neg, tokens.advantage_pos + tokens.advantage_neg
    return -value.clamp(low, high).exp() * advantage * tokens.log_ratio, {
        "clip_high": count * (value > high),
        "clip_low": count * (value < low),
    }


@register(level="token")
def sapo(
    tokens: Tokens, *, gate_pos: float = 1.0, gate_neg: float = 1.05
) -> tuple[Tensor, dict[str, Tensor]]:
    """-f(r) A with f(r) = 4 / g sigmoid(g (r - 1)), g = gate_pos if A > 0, else gate_neg: no clip.

    The gradient's weight falls smoothly on both sides of r = 1, where it is that of `ppo`.
    Source: arXiv:2511.20347, equations 5 and 6 (there g is tau).
    """
    away = tokens.log_ratio.clamp(max=_SATURATED).expm1()

    def gated(gate: float) -> Tensor:
        return 4 / gate * (gate * away).sigmoid()

    return -tokens.advantage_pos * gated(gate_pos) - tokens.advantage_neg * gated(gate_neg), {}


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf
