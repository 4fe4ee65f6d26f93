"""Optimizer steps that are not finite, and weights that a step has ruined: what the run does then."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_trainer import FakeTrainer
from tests.support.training_runs import Run, config_of, steps_of
from treepo.config.run import RunConfig
from treepo.errors import DivergedError
from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.soundness import WeightCheck
from treepo.protocols import BatchResult, MiniBatch
from treepo.training.checkpoints import newest
from treepo.tree import from_json

pytestmark = pytest.mark.usefixtures("graded")

SOUND = WeightCheck(largest=1.0, log_prob=-0.5, before=-0.4, tokens=100)


class Scripted(FakeTrainer):
    """Takes optimizer steps with the given norms of the gradient, two a training step; then sound ones.

    weights: measured after each training step, by its number.
    """

    def __init__(self, norms: Sequence[float] = (), weights: Mapping[int, WeightCheck] | None = None) -> None:
        super().__init__()
        self._norms, self._weights = list(norms), weights or {}
        self._step = 0

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        result = await super().train_batch(mini_batches, temperature)
        self._step += 1
        updates = [
            {**update, "grad_norm": norm, "loss": norm if math.isnan(norm) else 0.5}
            for update in result.updates
            for norm in [self._norms.pop(0) if self._norms else 1.0]
        ]
        mismatch = LogProbMismatch(math.nan, 4.0, math.inf) if math.nan in self._norms else result.mismatch
        weights = self._weights.get(self._step, SOUND)
        result = BatchResult(updates, mismatch, result.seconds, weights)
        return result if result.taken else BatchResult(updates, mismatch, result.seconds)


def run(config: RunConfig, trainer: FakeTrainer, resume: bool = False) -> dict[str, Any]:
    return Run(config, resume, trainer=trainer).train()


def test_skipped_steps_are_counted_and_the_run_goes_on(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two in a row, twice: three in a row would end it."""
    nan, inf = math.nan, math.inf
    config = config_of(folder, tmp_path / "run", steps=4)
    run(config, Scripted([1.0, nan, inf, 2.0, 4.0, nan, nan, 1.0]))
    metrics = steps_of(config.out)
    assert [line["train/skipped_steps"] for line in metrics] == [1, 1, 1, 1]
    assert [line["train/optimizer_steps"] for line in metrics] == [1, 1, 1, 1]
    assert [line["train/grad_norm"] for line in metrics] == [1.0, 2.0, 4.0, 1.0]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said[:2] == [
        "step 1: optimizer step 2 of 2 was skipped: the gradient's norm is nan, the loss nan",
        "step 2: optimizer step 1 of 2 was skipped: the gradient's norm is inf, the loss 0.5",
    ]
    assert len(said) == 4
    found = newest(config.out)
    assert found is not None
    assert math.isfinite(found[1].max_logprob_difference)


def test_three_skipped_steps_in_a_row_end_the_run_with_its_trees(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", steps=9)
    with pytest.raises(DivergedError) as error:
        run(config, Scripted([1.0] * 5 + [math.nan] * 3))
    said = str(error.value)
    assert said.startswith("step 4: the gradient's norm is nan, the loss nan, in 3 optimizer steps in a row")
    assert said.endswith(
        "Continue after step 2: --resume with a lower trainer.optimizer.learning_rate, now 1e-06"
    )
    assert "\n" not in said
    assert error.value.exit_code == 2
    saved = config.out / "skipped-step-00004.jsonl"
    assert str(saved) in said
    lines = saved.read_bytes().splitlines()
    assert len(lines) == 4
    assert all(from_json(line).leaves and json.loads(line)["step"] == 4 for line in lines)
    before = saved.read_bytes()
    run(config, Scripted(), resume=True)
    assert saved.read_bytes() == before
    assert [line["step"] for line in steps_of(config.out)] == list(range(1, 10))


def test_max_skipped_steps_is_the_limit(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run", steps=2, trainer={"max_skipped_steps": 1})
    with pytest.raises(DivergedError, match=r"step 1: .* There is no checkpoint: begin again with a lower"):
        run(config, Scripted([math.inf]))


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (WeightCheck(math.inf, -0.5, -0.4, 100), "step 4 has ruined the weights: a weight is not finite"),
        (WeightCheck(1e6, -2e4, -0.4, 100), r"a mean log-prob of -0.4 before, and have -2e\+04 now"),
        (WeightCheck(1.0, math.nan, -0.4, 100), "and have nan now .no sound step falls below -1.9"),
    ],
)
def test_ruined_weights_reach_neither_engine_nor_checkpoint(
    folder: Path, tmp_path: Path, weights: WeightCheck, text: str
) -> None:
    config = config_of(folder, tmp_path / "run", steps=9, checkpoint={"every": 1})
    trainer = Scripted(weights={4: weights})
    with pytest.raises(DivergedError, match=text) as error:
        run(config, trainer)
    assert "Continue after step 3: --resume with a lower" in str(error.value)
    assert "Its learning rate was 1e-06." in str(error.value)
    assert error.value.exit_code == 2
    assert "sync 4" not in trainer.events
    assert not any(event.startswith("export") for event in trainer.events)
    found = newest(config.out)
    assert found is not None
    assert found[1].steps_done == 3
    optimizer = config.trainer.optimizer.model_copy(update={"learning_rate": 1e-7})
    slower = config.trainer.model_copy(update={"optimizer": optimizer})
    assert run(config.model_copy(update={"trainer": slower}), Scripted(), resume=True)["steps"] == 9
