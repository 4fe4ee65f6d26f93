"""Any value of any key in a model folder's JSON files is taken or refused in one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.model_folders import without
from tests.support.tiny import write_tiny_qwen3_moe
from treepo.data.tokenizer import end_tokens, load_tokenizer
from treepo.errors import TreepoError
from treepo.preflight.model_folder import check_generation_config, check_present_parts, check_served_folder

ODD = [None, "text", -1, 0, 1.5, 1e30, 10**12, float("nan"), [], [1], {"a": 1}, True]
FURTHER = (
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "auto_map",
    "text_config",
    "quantization_config",
    "torch_dtype",
    "attention_bias",
    "mlp_bias",
    "partial_rotary_factor",
    "dual_chunk_attention_config",
)


def mutations(path: Path, further: tuple[str, ...] = ()) -> Iterator[str]:
    """Write each key of a JSON file with each odd value; yields what is written."""
    content = json.loads(path.read_text())
    for key in (*content, *further):
        for value in ODD:
            path.write_text(json.dumps(content | {key: value}))
            yield f"{path.name}: {key} = {value!r}"
    path.write_text(json.dumps(content))


def one_line_or_nothing(check: Callable[[], object], what: str) -> bool:
    """Whether the check refuses, which it must do with one line that names the file."""
    refusal = ""
    try:
        check()
    except TreepoError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(what) from error
    assert "\n" not in refusal, what
    assert not refusal or "model" in refusal, what
    return bool(refusal)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "olmo2"])
def test_any_value_in_config_json_is_one_line_or_taken(
    folder: Path, family: str, request: pytest.FixtureRequest
) -> None:
    if family == "qwen3_moe":
        without("model.safetensors")(folder)
        write_tiny_qwen3_moe(folder, vocab_size=512)
    elif family == "olmo2":
        request.getfixturevalue("olmo2")
    refused = [
        one_line_or_nothing(lambda: check_served_folder(folder, trained=family != "olmo2"), what)
        for what in mutations(folder / "config.json", FURTHER)
    ]
    assert len(refused) / 3 < sum(refused) < len(refused)
    check_served_folder(folder)


def test_any_value_in_a_config_without_weights_is_one_line_or_taken(folder: Path) -> None:
    without("model.safetensors")(folder)
    for what in mutations(folder / "config.json", FURTHER):
        one_line_or_nothing(lambda: check_present_parts(folder), what)


def test_any_value_in_generation_config_json_is_one_line_or_taken(folder: Path) -> None:
    for what in mutations(folder / "generation_config.json", ("max_length", "cache_implementation")):
        one_line_or_nothing(lambda: (check_generation_config(folder), end_tokens(folder)), what)


def test_any_value_in_tokenizer_config_json_is_one_line_or_taken(folder: Path) -> None:
    for what in mutations(folder / "tokenizer_config.json", ("chat_template", "auto_map", "bos_token")):
        one_line_or_nothing(lambda: load_tokenizer(folder).encode("1 + 1"), what)
