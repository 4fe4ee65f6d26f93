"""Trees to packs: the micro-batches on which a shared token is trained once."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A forest of T tokens in depth-first order.

    Token i may attend to token j iff j <= i < exit[j]; that is the whole attention mask.
    """

    token: np.ndarray  # int32 [T]
    position: np.ndarray  # int32 [T], depth on the token's own path
    exit: np.ndarray  # int32 [T], index one past the token's subtree
    source: np.ndarray  # int32 [T], index whose hidden state predicts this token; -1 for a tree's first
    advantage_pos: np.ndarray  # float64 [T], sum of the positive advantages of the leaves below
    advantage_neg: np.ndarray  # float64 [T], sum of the negative ones
    count_pos: np.ndarray  # float64 [T], leaves behind advantage_pos (an advantage of 0 counts here)
    count_neg: np.ndarray  # float64 [T], leaves behind advantage_neg; both 0: context only, not trained
    rollout_log_prob: np.ndarray  # float32 [T], the engine's; 0 on the prompt
    old_log_prob: np.ndarray | None  # float32 [T], the actor's before this step's updates
    version: np.ndarray  # int32 [T], weight version that sampled the token; -1 on the prompt
