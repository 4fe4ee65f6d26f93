"""Real Megatron-Core ranks send in all lanes what rank 0 would send alone, bit for bit, at every layout."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import megatron_ranks
from tests.support.lane_ranks import LaneCase, send_in_lanes
from tests.support.trainer_checks import write_model
from tests.support.trainer_layouts import LAYOUTS

pytestmark = pytest.mark.slow

# Tied embeddings and a padded vocabulary, experts, replicas: each on the layouts that divide them.
CASES = {
    2: [("data 2", "qwen2-tied", None), ("tensor 2, expert 2", "qwen3_moe", 2)],
    4: [
        ("tensor 2, pipeline 2", "qwen2-tied", 1),
        ("tensor 2, pipeline 2, interleaved", "llama", None),
        ("tensor 2, data 2", "qwen3, biased", None),
        ("context 2, tensor 2, expert 4", "qwen3_moe", None),
        ("pipeline 2, data 2, expert 2", "qwen2_moe", 1),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_every_layout_sends_every_tensor_once(ranks: int, tmp_path: Path) -> None:
    lives: Sequence[megatron_ranks.Life] = [
        (
            f"{layout}, {model}",
            send_in_lanes,
            LaneCase(write_model(model, tmp_path / f"{layout}, {model}"), LAYOUTS[layout], failing),
        )
        for layout, model, failing in CASES[ranks]
    ]
    faults = megatron_ranks.run_lives(lives, LAYOUTS[CASES[ranks][0][0]], tmp_path / "ranks")
    assert faults == {name: [] for name, *_ in lives}
