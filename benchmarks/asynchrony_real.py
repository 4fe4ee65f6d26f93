"""The loop's settings on real processes: `treepo train` on the quickstart's model, one thread for the engine
and one for the trainer.

The sampling temperature makes all tokens about equally likely. So the end token comes by chance, and answers
have a long tail: 320 tokens on average, up to `max_response_tokens`. The settings take turns in every repeat.
The first two steps of a run do not count, nor the last one, for which no later trees grow.

- `sync`: the engine waits while the trainer learns.
- `oversample`: the same, with `sampling.oversample: 1.5`.
- `async`: `loop.mode: async`, `loop.max_staleness: 1`.
- `async, one segment`: the same with a segment as long as the longest answer. Its weight syncs interrupt
  requests in the middle of long segments.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.training_run import train

CONFIG = "examples/quickstart.yaml"
BASE = (
    "placement=split",
    "data.heldout=null",
    "data.prompts_per_step=4",
    "sampling.temperature=50.0",
    "sampling.max_response_tokens=512",
    "trainer.max_tokens_per_pack=4096",
    "checkpoint.every=null",
)
SEGMENTS = ("sampling.segment_tokens=64", "sampling.max_depth=8")
ONE_SEGMENT = ("sampling.segment_tokens=512", "sampling.max_depth=1", "sampling.initial_branching=8")
ASYNC = ("loop.mode=async", "loop.max_staleness=1")
SETTINGS: Mapping[str, Sequence[str]] = {
    "sync": SEGMENTS,
    "oversample": (*SEGMENTS, "sampling.oversample=1.5"),
    "async": (*SEGMENTS, *ASYNC),
    "async, one segment": (*ONE_SEGMENT, *ASYNC),
}
_COUNTED = slice(2, -1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--real")
    group.add_argument("--repeats", type=int, default=5)
    group.add_argument("--run-steps", type=int, default=7, help="of one run, all but three counted")
    group.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")


def lines(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line a run, and at the end the medians of the repeats' ratios."""
    assert arguments.run_steps >= 4, "--run-steps: three steps do not count"
    runs: list[dict[str, dict[str, Any]]] = []
    for repeat in range(arguments.repeats):
        runs.append({})
        for setting, overrides in SETTINGS.items():
            runs[-1][setting] = run(arguments.run_steps, [*BASE, *overrides, *arguments.set])
            yield {"setting": setting, "repeat": repeat, **runs[-1][setting]}
    yield {
        "async_over_sync": _ratio(runs, "async", "sync"),
        "async_over_sync_per_token": _ratio(runs, "async", "sync", per_token=True),
        "oversample_over_plain": _ratio(runs, "oversample", "sync"),
        "pause_ms": {  # by segment_tokens
            "64": median(each["async"]["pause_ms"] for each in runs),
            "512": median(each["async, one segment"]["pause_ms"] for each in runs),
        },
        "repeats": arguments.repeats,
        "steps": arguments.run_steps,
        "settings": {"config": CONFIG, "base": BASE, **SETTINGS, "set": arguments.set},
    }


def run(steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, and measure the steps that count: means over them, except the median of the pauses."""
    metrics, _ = train(CONFIG, [f"steps={steps}", *overrides])
    counted = metrics[_COUNTED]
    seconds = counted[-1]["time"] - metrics[_COUNTED.start - 1]["time"]

    def mean(name: str) -> float:
        return sum(step[name] for step in counted) / len(counted)

    return {
        "step_seconds": round(seconds / len(counted), 3),
        "pause_ms": round(1000 * median(step["seconds/weight_sync"] for step in counted), 1),
        "waiting_seconds": round(mean("seconds/sample"), 3),
        "learning_seconds": round(mean("seconds/log_probs") + mean("seconds/train"), 3),
        "engines_idle": round(mean("idle/engines"), 3),
        "trainer_idle": round(mean("idle/trainer"), 3),
        "staleness_mean": round(mean("staleness/mean"), 3),
        "staleness_max": max(step["staleness/max"] for step in counted),
        "response_tokens": round(mean("response_tokens"), 1),
        "decoded_tokens": round(mean("rollout/decoded_tokens")),
    }


def _ratio(
    runs: Sequence[Mapping[str, Mapping[str, Any]]], one: str, other: str, *, per_token: bool = False
) -> float:
    """The median over repeats of the seconds a step, or a decoded token, of one setting over another's."""

    def seconds(run: Mapping[str, Any]) -> float:
        return run["step_seconds"] / (run["decoded_tokens"] if per_token else 1)

    return round(median(seconds(each[one]) / seconds(each[other]) for each in runs), 3)
