"""Train the quickstart with each policy loss, from several seeds, on real processes.

    treepo toy
    python -m benchmarks.losses_learning --out losses.jsonl

Each step has four mini-batches: with one, all losses have the same gradient. The learning rate is half the
quickstart's, for four times as many updates; `--set` can change it. One JSON line a run, appended to
`--out`; runs that it has already are passed over. `accuracy` is that of 1024 held-out answers after the last
step, `decoded_tokens` what training decoded, `clipped` the share of trained tokens that a bound of the loss
held, over all steps.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.training_run import train
from treepo.learning.policy_losses import POLICY_LOSSES

CONFIG = "examples/quickstart.yaml"
OVERRIDES = (
    "evaluation.samples=4",
    "checkpoint.every=null",
    "learning.mini_batches=4",
    "trainer.optimizer.learning_rate=1.0e-4",
)


def run(loss: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train once; a loss with one ratio a response gets flat packs."""
    packing = "flat" if POLICY_LOSSES[loss].level == "leaf" else "tree"
    chosen = (f"learning.loss={loss}", f"learning.packing={packing}", f"seed={seed}")
    steps, _ = train(CONFIG, [*OVERRIDES, *chosen, *overrides])
    evaluated = [step for step in steps if "heldout/accuracy" in step]
    trained = [step for step in steps if "train/grad_norm" in step]
    return {
        "loss": loss,
        "seed": seed,
        "accuracy": round(evaluated[-1]["heldout/accuracy"], 4),
        "accuracy_before": round(evaluated[0]["heldout/accuracy"], 4),
        "steps": len(trained),
        "decoded_tokens": round(sum(step["rollout/decoded_tokens"] for step in trained)),
        "clipped": _clipped(trained),
        "overrides": list(overrides),
    }


def _clipped(steps: Sequence[Mapping[str, float]]) -> float | None:
    """Mean share of tokens that a bound held; None for a loss without bounds."""
    if "train/clip_high" not in steps[0]:
        return None
    return round(sum(step["train/clip_high"] + step["train/clip_low"] for step in steps) / len(steps), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(POLICY_LOSSES), default=list(POLICY_LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    done = []
    if options.out.exists():
        lines = map(orjson.loads, options.out.read_bytes().splitlines())
        done = [(line["loss"], line["seed"], line["overrides"]) for line in lines]
    for seed in options.seeds:
        for loss in options.losses:
            if (loss, seed, options.set) in done:
                continue
            line = orjson.dumps(run(loss, seed, options.set), option=orjson.OPT_APPEND_NEWLINE)
            with options.out.open("ab") as out:
                out.write(line)
            print(line.decode(), end="", flush=True)  # noqa: T201 - the result


if __name__ == "__main__":
    main()
