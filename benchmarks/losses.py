"""Time each policy loss, packed against flat: the learning rule alone, without a model.

    OMP_NUM_THREADS=1 python -m benchmarks.losses

Trees have 2, 4, 8, then 16 segments of 512 tokens at each depth. The loss and its gradient of each token's
log-prob are computed pack by pack, in float32 on one thread. Packed and flat packs alternate. Seconds are CPU
seconds (other work on the machine does not count), medians of repeats. One JSON line a loss:
`trajectory_tokens_per_second` counts the tokens of all trajectories, shared ones as often as they occur, so
that both ways count the same work; `flat_over_packed` is their ratio, `ideal` that of the tokens. `gspo` has
no packed figure: it needs flat packs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.packed_and_flat import Setting, Work, work
from treepo.config.learning import LearningConfig
from treepo.learning.loss import policy_loss
from treepo.learning.packing import Pack
from treepo.learning.policy_losses import POLICY_LOSSES

_VOCABULARY = 1000


def columns(packs: Sequence[Pack]) -> list[dict[str, Tensor]]:
    """The packs as the trainer has them, with old log-probs near the engine's."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for pack in packs:
        values = {name: torch.from_numpy(column) for name, column in pack.columns().items()}
        noise = 0.1 * torch.randn(len(pack), generator=generator)
        found.append(values | {"old_log_prob": values["rollout_log_prob"] + noise})
    return found


def seconds(packs: Sequence[dict[str, Tensor]], config: LearningConfig, denominator: float) -> float:
    """CPU seconds of loss and gradient of all packs."""
    log_probs = [(pack["old_log_prob"] + 0.05).requires_grad_() for pack in packs]
    start = time.process_time()
    for log_prob, pack in zip(log_probs, packs, strict=True):
        loss, _ = policy_loss(log_prob, pack, config, denominator)
        loss.backward()
    return time.process_time() - start


def measure(loss: str, made: Work, total_tokens: int, repeats: int) -> dict[str, object]:
    """One loss's figures."""
    flat_only = POLICY_LOSSES[loss].level == "leaf"
    ways = ["flat"] if flat_only else ["packed", "flat"]
    packs = {way: columns(made.packs[way]) for way in ways}
    configs = {
        way: LearningConfig.model_validate({"loss": loss, "packing": "tree" if way == "packed" else "flat"})
        for way in ways
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way in ways:
            times[way].append(seconds(packs[way], configs[way], made.denominator))
    median = {way: statistics.median(values[1:]) for way, values in times.items()}
    record: dict[str, object] = {
        "loss": loss,
        "trajectory_tokens_per_second": {way: round(total_tokens / it) for way, it in median.items()},
    }
    if not flat_only:
        record["flat_over_packed"] = round(median["flat"] / median["packed"], 2)
        record["ideal"] = round(made.tokens("flat") / made.tokens("packed"), 2)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--leaf-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(options.prompts, 256, options.leaf_tokens, 512, 2, 16384)
    made = work(setting, _VOCABULARY)
    for loss in POLICY_LOSSES:
        line = measure(loss, made, setting.total_tokens, options.repeats)
        print(json.dumps(line), flush=True)  # noqa: T201 - the result


if __name__ == "__main__":
    main()
