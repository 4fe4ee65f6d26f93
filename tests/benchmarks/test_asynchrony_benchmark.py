"""The simulated half of benchmarks/asynchrony.py, on small steps of the paper's run."""

import argparse

import pytest

from benchmarks.asynchrony_simulated import SETTINGS, add_arguments, layout, lines, splits
from tests.support.paths import ROOT

SMALL = [
    "data.prompts_per_step=32",
    "learning.mini_batches=2",
    "sampling.segment_tokens=64",
    "sampling.max_depth=4",
    "sampling.width=4",
    "sampling.max_response_tokens=256",
    "sampling.fallback.window_tokens=64",
    "reward.overlong_buffer_tokens=64",
    "plan.response_tokens=100",
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*words, "--override", *SMALL])


@pytest.mark.slow
def test_every_line_holds_its_bounds_and_comes_again() -> None:
    size = ["--gpus", "8", "--dropped", "0.3", "--prompts", "4", "--steps", "2", "--seeds", "1"]
    words = [*size, "--only", "oversample", "async-1"]
    found = list(lines(arguments(*words)))
    assert [line["setting"] for line in found] == ["sync", "oversample", "async-1"]
    for line in found:
        assert all(0 <= line[key] <= 1 for key in ("engines_idle", "trainer_idle", "gpus_idle"))
        assert line["max_staleness"] <= (0 if line["setting"] == "sync" else 1)
        assert line["steps_per_hour"] == pytest.approx(3600 / line["seconds"])
        assert 0 < line["simulated_share"] <= 1
        gpus = line["trainer_gpus"], line["engine_gpus"]
        assert gpus == (8, 8) if line["placement"] == "colocated" else sum(gpus) == 8
    assert found[0]["over_sync"] == 1
    assert list(lines(arguments(*size, "--only", "sync"))) == found[:1]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("gpus", [64, 512])
def test_layouts_use_all_gpus(setting: str, gpus: int) -> None:
    for trainer, engines in splits(setting, gpus, replicas=32):
        assert trainer + engines == gpus if setting.startswith("async") else trainer == engines == gpus
        parallel = dict(each.rsplit(".", 1)[1].split("=") for each in layout(setting, trainer, 32)[:3])
        assert int(parallel["tensor"]) * int(parallel["data"]) * int(parallel["pipeline"]) == trainer
        assert 32 % int(parallel["data"]) == 0
