"""What benchmarks/routing_replay.py prints, from runs that did not happen."""

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import routing_replay

RUNS: dict[str, list[dict[str, float]]] = {
    "none": [
        {"seconds/step": 1.0, "logprob_difference_mean": 3.0, "accuracy": 0.25},
        {"seconds/step": 1.0, "logprob_difference_mean": 5.0, "accuracy": 0.75},
    ],
    "rollout": [
        {"logprob_difference_mean": 1.0, "accuracy": 0.5, "routing/own_choice_differs": 0.125},
    ],
}


def test_a_line_a_step_then_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def run(overrides: Sequence[str]) -> tuple[list[dict[str, float]], dict[str, Any]]:
        asked.append(overrides)
        setting = overrides[0].removeprefix("trainer.routing_replay=")
        return RUNS[setting], {"accuracy_before": 0.0, "accuracy_after": 1.0, "seconds": 9.0}

    monkeypatch.setattr(routing_replay, "run", run)
    *steps, last = routing_replay.lines(["none", "rollout"], ["model.dtype=bfloat16"])
    assert asked == [
        [f"trainer.routing_replay={setting}", "model.dtype=bfloat16"] for setting in ("none", "rollout")
    ]
    assert [(line["setting"], line["step"]) for line in steps] == [("none", 1), ("none", 2), ("rollout", 1)]
    assert all("seconds/step" not in line for line in steps)
    assert steps[2]["routing/own_choice_differs"] == 0.125
    accuracies = {"accuracy_before": 0.0, "accuracy_after": 1.0}
    assert last["means"] == {
        "none": {"mean logprob_difference_mean": 4.0, "mean accuracy": 0.5, **accuracies},
        "rollout": {
            "mean logprob_difference_mean": 1.0,
            "mean accuracy": 0.5,
            "mean routing/own_choice_differs": 0.125,
            **accuracies,
        },
    }
