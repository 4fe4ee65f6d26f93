"""What routing replay does to the log-probs of a mixture: `treepo train` on the toy mixture in bfloat16.

    python -m benchmarks.routing_replay            # in the repository's root, after `treepo toy --moe`

Engine and trainer compute in bfloat16 with kernels of their own, so their hidden states differ in the last
bits, and a router whose second and third expert are close chooses another one: on this toy, in one of 200
(token, layer) pairs. One JSON line a step of each setting, and at the end one of the means over the steps.
`docs/figures/make.py` draws the lines. Ten minutes on two busy cores.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from benchmarks.training_run import train

CONFIG = "examples/quickstart-moe.yaml"
SETTINGS = ("none", "rollout")  # of trainer.routing_replay
MEASURED = (
    *("logprob_difference_mean", "logprob_difference_max", "train/importance_max", "accuracy"),
    "routing/own_choice_differs",  # with replay alone
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=("none", "trainer", "rollout"), default=SETTINGS)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")
    arguments = parser.parse_args()
    for line in lines(arguments.settings, ["model.dtype=bfloat16", *arguments.set]):
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.flush()


def lines(settings: Sequence[str], overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The steps of each setting, then the means of all settings."""
    means: dict[str, dict[str, float]] = {}
    for setting in settings:
        steps, summary = run([f"trainer.routing_replay={setting}", *overrides])
        measured = [{name: value for name, value in step.items() if name in MEASURED} for step in steps]
        for number, values in enumerate(measured, start=1):
            yield {"benchmark": "routing_replay", "setting": setting, "step": number, **values}
        means[setting] = {
            **{f"mean {name}": _mean(each[name] for each in measured) for name in measured[0]},
            **{name: summary[name] for name in ("accuracy_before", "accuracy_after")},
        }
    yield {"benchmark": "routing_replay", "config": CONFIG, "overrides": list(overrides), "means": means}


def run(overrides: Sequence[str]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train once. Returns the metrics of every step, and the run's summary."""
    metrics, summary = train(CONFIG, overrides)
    return [step for step in metrics if "seconds/step" in step], summary  # the others are evaluations


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
