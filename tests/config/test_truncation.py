"""`top_p`, `top_k`, `min_p` and `from_model`: where they are allowed, and where the values come from."""

import json
import logging
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from treepo.config.evaluate import EvalConfig
from treepo.config.load import dump_config, load_as, load_config
from treepo.config.rollout import RolloutConfig
from treepo.errors import ConfigError, TreepoError
from treepo.preflight.recommended_sampling import evaluation_as_recommended, rollout_as_recommended

QUICKSTART = ROOT / "examples/quickstart.yaml"
ROLLOUT = ROOT / "examples/rollout.yaml"


def evaluation(*overrides: str) -> EvalConfig:
    return load_as(
        EvalConfig, None, ["out=o", "model.path=m", "data.benchmarks=[{path: x.jsonl}]", *overrides]
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    recommend(tmp_path, temperature=0.7, top_p=0.8, top_k=20, do_sample=True)
    return tmp_path


def recommend(folder: Path, **values: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("override", ["top_p=0.9", "top_k=20", "min_p=0.1", "from_model=true"])
def test_training_refuses_what_leaves_tokens_out_and_says_why(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [f"sampling.{override}"])
    (line,) = str(error.value).splitlines()
    key = override.partition("=")[0]
    assert f"sampling: {key} = " in line
    assert "training samples from all tokens" in line


@pytest.mark.parametrize("override", ["top_p=1", "top_k=null", "min_p=0", "from_model=false"])
def test_values_that_leave_nothing_out_are_allowed_everywhere(override: str) -> None:
    load_config(QUICKSTART, [f"sampling.{override}"])


@pytest.mark.parametrize("override", ["top_p=0", "top_p=1.1", "top_k=0", "min_p=1", "min_p=-0.1"])
def test_values_out_of_range_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"sampling\.{override.partition('=')[0]}: should be"):
        evaluation(f"sampling.{override}")


def test_min_p_with_draws_by_seed_would_end_sglang() -> None:
    seeds = "engine.sglang={enable_deterministic_inference: true}"
    for load in (evaluation, lambda *given: load_as(RolloutConfig, ROLLOUT, given)):
        with pytest.raises(ConfigError, match=r"sampling\.min_p = 0\.1 with engine\.sglang"):
            load("sampling.min_p=0.1", seeds)
        load("sampling.top_p=0.9", seeds)


def test_a_model_s_recommendation_fills_in_what_is_not_given(model: Path) -> None:
    config = evaluation("sampling.from_model=true", "sampling.temperature=0.5", f"model.path={model}")
    filled = evaluation_as_recommended(config).sampling
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.5, 0.8, 20, 0.0)
    assert filled.width == config.sampling.width


def test_a_saved_configuration_keeps_its_values_when_the_model_recommends_others(model: Path) -> None:
    config = load_as(RolloutConfig, ROLLOUT, ["sampling.from_model=true", f"model.path={model}"])
    filled = rollout_as_recommended(config)
    assert filled.sampling.temperature == 0.7
    saved = model / "config.yaml"
    saved.write_text(dump_config(filled))
    recommend(model, temperature=0.1)
    again = rollout_as_recommended(load_as(RolloutConfig, saved))
    assert again == filled


def test_without_from_model_the_file_is_not_read() -> None:
    config = evaluation()
    assert evaluation_as_recommended(config) is config


def test_top_k_of_all_tokens_and_what_is_not_applied(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    recommend(model, top_k=0, min_p=0.05, repetition_penalty=1.05, typical_p=1.0)
    with caplog.at_level(logging.WARNING):
        filled = evaluation_as_recommended(evaluation("sampling.from_model=true", f"model.path={model}"))
    assert (filled.sampling.top_k, filled.sampling.min_p) == (None, 0.05)
    (record,) = caplog.records
    assert "also recommends repetition_penalty = 1.05, which is not applied" in record.getMessage()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": True}, r"none of temperature, top_p, top_k, min_p, which sampling\.from_model"),
        (
            {"top_p": 1.5},
            r"recommends top_p = 1\.5: sampling\.top_p: Input should be less than",
        ),
        ({"top_k": "many"}, r"recommends top_k = 'many': sampling\.top_k"),
        ({"temperature": 0.0}, r"recommends temperature = 0\.0: sampling: temperature = 0 gives the same"),
        (None, r"generation_config\.json: no such file, and sampling\.from_model"),
    ],
)
def test_a_recommendation_that_cannot_be_used_is_one_line(
    model: Path, values: dict[str, object] | None, message: str
) -> None:
    (model / "generation_config.json").unlink()
    if values is not None:
        recommend(model, **values)
    with pytest.raises(TreepoError, match=message) as error:
        evaluation_as_recommended(evaluation("sampling.from_model=true", f"model.path={model}"))
    assert len(str(error.value).splitlines()) == 1
