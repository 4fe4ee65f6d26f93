"""How far the engine's log-probs are from the trainer's, on the tokens that are trained."""

from collections.abc import Iterable

import numpy as np

from treepo.learning.packing import Pack


def log_prob_mismatch(packs: Iterable[Iterable[Pack]]) -> dict[str, float]:
    """`logprob_difference_mean` (each token as often as trajectories share it) and `logprob_difference_max`,
    of |trainer - engine|; the packs of all replicas must carry `old_log_prob`. 0 where nothing is trained.

    Tokens that older weights sampled count too: with stale ones in the batch this is more than numerics.
    """
    total = weight = largest = 0.0
    for pack in (pack for replica in packs for pack in replica):
        assert pack.old_log_prob is not None, "attach the trainer's log-probs first"
        count = pack.count_pos + pack.count_neg
        difference = np.abs(pack.old_log_prob - pack.rollout_log_prob, dtype=np.float64) * (count > 0)
        total += float(difference @ count)
        weight += float(count.sum())
        largest = float(np.maximum(largest, difference.max()))  # not `max`, which loses NaN
    return {"logprob_difference_mean": total / max(weight, 1.0), "logprob_difference_max": largest}
