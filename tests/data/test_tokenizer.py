"""Tokenizer of a model folder: end tokens, prompts in, responses out, and errors for a broken folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from treepo.data.tokenizer import (
    RefusedMessagesError,
    Tokenizer,
    end_tokens,
    load_tokenizer,
)
from treepo.errors import ModelError

TEMPLATE = (
    "{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


def write_folder(folder: Path, template: str | None = TEMPLATE, **generation: object) -> Path:
    """A folder with a byte tokenizer, without weights; <|end|> is token 1, and the tokenizer's end."""
    specials = ["<|pad|>", "<|end|>", "<|start|>"]
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = FastTokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", chat_template=template)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 1}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture
def templated(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_folder(tmp_path))


def test_chat_template_opens_the_assistants_turn(templated: Tokenizer) -> None:
    text = templated.render(MESSAGES)
    assert text == "<|system|>Be brief.<|end|><|user|>1 + 1?<|end|><|assistant|>"
    tokens = templated.encode(text)
    assert tokens.dtype == np.int32
    assert (tokens == 1).sum() == 2  # the template's end tokens are one token each


def test_without_a_template_a_prompt_is_its_plain_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, template=None))
    assert tokenizer.render(MESSAGES) == "Be brief.\n\n1 + 1?"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].nothing.at_all }}", "'dict object' has no attribute 'nothing'"),
        ("{{ messages[5].content }}", "list object has no element 5"),
        ("{{ bos_tokens() }}", "'bos_tokens' is undefined"),
    ],
)
def test_messages_that_a_template_refuses(tmp_path: Path, template: str, said: str) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, template))
    with pytest.raises(RefusedMessagesError) as raised:
        tokenizer.render(MESSAGES)
    assert str(raised.value).startswith("the chat template refuses the messages (system, user): ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_template_that_is_not_valid(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, "{% for m in messages %}\n{{ m.content }"))
    with pytest.raises(ModelError, match=f"{tmp_path}: its chat template is not valid: line 2: ") as raised:
        tokenizer.render(MESSAGES)
    assert not isinstance(raised.value, RefusedMessagesError)


@pytest.mark.parametrize("text", ["", "two", "½ ≠ 🧮", " two\n\n lines ", "\\boxed{\\frac{1}{2}}", "\0"])
def test_any_text_comes_back(templated: Tokenizer, text: str) -> None:
    assert templated.decode(templated.encode(text)) == text


def test_decoding_leaves_the_end_token_out(templated: Tokenizer) -> None:
    assert templated.decode([*templated.encode("four"), 1]) == "four"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (1,)),
        ({"eos_token_id": 7}, (1, 7)),
        ({"eos_token_id": [9, 1, 7]}, (1, 7, 9)),
        ({"eos_token_id": None}, (1,)),
        ({"text_config": None}, (1,)),
        ({"text_config": {"eos_token_id": 3}}, (1, 3)),
    ],
)
def test_every_end_token_counts(
    tmp_path: Path, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert load_tokenizer(write_folder(tmp_path, **generation)).end_tokens == expected


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_folder_without_config(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=rf"{tiny_model}: it has no vocabulary of a tokenizer \(none of"):
        load_tokenizer(tiny_model)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_broken_config(tmp_path: Path, content: str) -> None:
    (write_folder(tmp_path) / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config.json: .*JSON"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"{tmp_path}/tokenizer.json: not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "1"}, "content": ""}, "What is 2 + 34?"),
        ("pre_tokenizer", None, "Whatis12+34?"),
        ("decoder", None, "W h a t Ġ i s Ġ 1 2 Ġ + Ġ 3 4 ?"),
    ],
)
def test_a_tokenizer_that_loses_text(tmp_path: Path, key: str, value: object, written: str) -> None:
    path = write_folder(tmp_path) / "tokenizer.json"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    load_tokenizer(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=r"its tokenizer makes .* its files are broken") as raised:
        load_tokenizer(tmp_path)
    assert f"of the text 'What is 12 + 34?', and {written!r} of these" in str(raised.value)


def test_no_end_token_anywhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ModelError, match="no end token"):
        end_tokens(tmp_path)
