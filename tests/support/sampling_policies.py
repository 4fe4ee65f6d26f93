"""Configurations of every sampling policy, for trees small enough to grow in a moment."""

from typing import Any

from treepo.config.sampling import SamplingConfig

_LOOP = {"check": "first", "window_tokens": 1, "count": 3, "min_distinct": 1}
_SINUSOIDAL = {
    "policy": "high_sum",
    "temperature": 5.0,
    "schedule": "sinusoidal",
    "final_temperature": 1.0,
    "schedule_steps": 9,
}

POLICIES: dict[str, dict[str, Any]] = {
    "paper": {},
    "initial range": {"initial_branching": "1-7"},
    "random budget": {"budget": "random", "branching": "1-4"},
    "token budget": {"budget": "tokens", "tokens_per_step": 30},
    "token cap": {"cap": "response_tokens", "tree_response_tokens": 150},
    "low mean": {"allocation": {"policy": "low_mean"}, "branching": 3},
    "sinusoidal": {"allocation": _SINUSOIDAL},
    "late": {"branch": {"from_depth": 3}},
    "surprise": {"branch": {"at": "surprise"}},
    "late surprise": {"branch": {"at": "surprise", "window_tokens": 3, "from_depth": 2}, "branching": 3},
    "lookahead": {"branch": {"lookahead": 2}},
    "late lookahead, initial range": {
        "branch": {"lookahead": 3, "from_depth": 2},
        "branching": 3,
        "initial_branching": "2-6",
        "max_response_tokens": 34,
        "fallback": {"order": "random"},
    },
    "lookahead, surprise, unaligned": {
        "branch": {"lookahead": 1, "at": "surprise"},
        "branching": 4,
        "fallback": {"cut": "min_log_prob", "aligned": False},
    },
    "with eos": {"stops": {"boxed": "with_eos"}},
    "looping": {"stops": {"repetition": _LOOP}},
    "limit": {"max_response_tokens": 29},
    "min log-prob, unaligned": {"fallback": {"cut": "min_log_prob", "aligned": False}},
    "block, unaligned": {"fallback": {"cut": "block", "block_tokens": 3, "aligned": False}},
    "random, unaligned": {"fallback": {"window_tokens": 5, "aligned": False, "order": "longer"}},
    "from start": {"fallback": {"cut": "from_start", "order": "finished_strict"}},
    "no fallback": {"fallback": {"cut": "none"}},
    "sequential": {"mode": "sequential"},
}


def letters(policy: str) -> int:
    """Letters of a FakeEngine. With few, answers loop and siblings begin alike, as some policies need."""
    return 3 if policy == "looping" or "lookahead" in policy else 400


def sampling(**values: Any) -> SamplingConfig:
    """Twelve leaves of at most five segments of eight tokens, unless `values` say otherwise."""
    small = {
        "segment_tokens": 8,
        "max_depth": 5,
        "max_response_tokens": 40,
        "width": 12,
        "retry_seconds": 0.0,
    }
    return SamplingConfig.model_validate({**small, **values})
