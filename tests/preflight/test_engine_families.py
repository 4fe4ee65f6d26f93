"""Families that SGLang serves and the trainer does not know: sampled from, never trained, checked as well."""

from pathlib import Path

import pytest
import torch

from tests.support.model_folders import Change, config, tensors
from tests.support.preflight_commands import convert, evaluate, plan, rollout, run, train
from treepo.errors import TreepoError

LM_HEAD, UP = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.usefixtures("olmo2")
def test_an_engines_family_is_sampled_from_and_not_trained() -> None:
    for command in (rollout, evaluate):
        run(command)
    for command in (train, convert, plan):
        with pytest.raises(
            TreepoError,
            match=r'model_type = "olmo2" is not supported \(the trainer has no norms after .*\); qwen2',
        ):
            run(command)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            tensors(lambda t: t.pop(LM_HEAD)),
            r"model: no file has lm_head\.weight, which Olmo2ForCausalLM needs",
        ),
        (tensors(lambda t: t.pop(UP)), r"no file has model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            tensors(lambda t: t.update({"v_head.weight": torch.zeros(1)})),
            r"it has v_head\.weight, which no Olmo2",
        ),
        (
            config(num_hidden_layers=1),
            r"it has model\.layers\.1\..*, which no Olmo2ForCausalLM with this config",
        ),
        (config(vocab_size=1024), r"has shape \[512, 32\], but \[1024, 32\] by config\.json"),
        (
            config(hidden_size="x"),
            r"config\.json: transformers refuses it: Field 'hidden_size' expected int, got str",
        ),
        (config(num_hidden_layers=10**9), r"num_hidden_layers = 1000000000; it must be at most 1024"),
        (config(architectures=None), r"config\.json: architectures = null; it must be"),
        (config(eos_token_id="</s>"), r'config\.json: eos_token_id = "</s>"; it must be'),
    ],
)
def test_an_engines_family_is_checked_too(olmo2: Path, change: Change, said: str) -> None:
    change(olmo2)
    for command in (rollout, evaluate):
        with pytest.raises(TreepoError, match=said) as raised:
            run(command)
        assert "\n" not in str(raised.value)


def test_a_feature_that_the_trainer_does_not_build_is_sampled_from(folder: Path) -> None:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config(rope_parameters=yarn)(folder)
    for command in (rollout, evaluate):
        run(command)
    with pytest.raises(
        TreepoError, match=r'config\.json: rope_type = "yarn" is not supported; default, llama3 are'
    ):
        run(train)
    config(architectures=["Qwen2ForSequenceClassification"])(folder)
    with pytest.raises(TreepoError, match=r"architectures = .*; it must be"):
        run(rollout)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_what_an_engine_would_serve_otherwise_is_refused(
    folder: Path, family: str, request: pytest.FixtureRequest
) -> None:
    if family == "mistral":
        request.getfixturevalue("mistral")
    sliding = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    config(sliding_window=288, **sliding)(folder)
    for command in (rollout, evaluate):
        run(command)  # 256 and 32 tokens
        with pytest.raises(TreepoError, match=r"sliding_window = 288; SGLang .* = 289 must be at most 288"):
            run(command, 257)
    with pytest.raises(TreepoError, match=r"sliding_window = (true; only false|288; only null) is supported"):
        run(train)
    config(sliding_window=None, use_sliding_window=False, hidden_act="gelu")(folder)
    for command in (rollout, evaluate):
        with pytest.raises(TreepoError, match=r'config\.json: hidden_act = "gelu"; SGLang serves silu only'):
            run(command)
