"""`treepo convert` of GGUF files: every weight, the tokenizer, and one line for what it cannot read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, Qwen2Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from typer.testing import CliRunner

from megatron_bridge.convert import convert
from megatron_bridge.gguf_header import read_gguf_header
from tests.support.gguf_files import (
    F32,
    MERGES,
    MODELS,
    TEMPLATE,
    TOKENS,
    cut,
    quantised,
    write_gguf,
    write_model,
)
from treepo.cli.main import app
from treepo.data.tokenizer import Tokenizer, load_tokenizer
from treepo.errors import ModelError
from treepo.preflight.model_folder import check_served_folder

TEXT = "12345 the  well 12\n\nIt's é 中文 ①"


@pytest.mark.parametrize("architecture", MODELS)
def test_a_file_gives_the_model_that_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    before = write_model(tmp_path / "model", architecture)
    convert(write_gguf(tmp_path / "m.gguf", architecture, before), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    check_served_folder(tmp_path / "out", trained=True)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens).logits
            for name in ("out", "model")
        )
    assert torch.equal(ours, theirs)  # so config.json says the same


def test_an_output_layer_that_is_not_there_is_the_embedding(tmp_path: Path) -> None:
    before = write_model(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    convert(write_gguf(tmp_path / "m.gguf", "qwen3", before), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    check_served_folder(tmp_path / "out", trained=True)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_weights_are_the_numbers_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    """Its own reader is the witness, also for llama.cpp's order of queries and keys."""
    quantisation = GGMLQuantizationType[kind]
    before = write_model(tmp_path / "model", "llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", before, quantisation)
    convert(path, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    network = AutoModelForCausalLM.from_config(MODELS["llama"])
    witness = load_gguf_checkpoint(path, return_tensors=True, model_to_load=network)["tensors"]
    assert after.keys() == witness.keys()
    for name, tensor in witness.items():
        assert torch.equal(tensor, after[name]), name
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(after[embedding].numpy(), quantised(before[embedding], quantisation))


def test_the_header_is_the_one_that_the_gguf_package_reads(tmp_path: Path) -> None:
    before = write_model(tmp_path / "model", "llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", before, GGMLQuantizationType.Q8_0)
    header, witness = read_gguf_header(path), GGUFReader(path)
    metadata = {key: field.contents() for key, field in witness.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata.keys() == metadata.keys()
    for key, value in metadata.items():
        expected = pytest.approx(value, rel=1e-7) if isinstance(value, float) else value
        assert header.metadata[key] == expected, key
    assert list(header.tensors) == [tensor.name for tensor in witness.tensors]
    for tensor in witness.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.start, ours.bytes, ours.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))


def tokenizer_of(tmp_path: Path, **keys: Any) -> Tokenizer:
    before = write_model(tmp_path / "model", "llama")
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    convert(write_gguf(tmp_path / "m.gguf", "llama", before, keys=named), tmp_path / "out")
    return load_tokenizer(tmp_path / "out")


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["1", "2", "3", "4", "5", "Ġthe", "Ġ", "Ġ", "w", "e", "ll"]),
        ("qwen2", ["1", "2", "3", "4", "5", "Ġthe", "Ġ", "Ġ", "w", "e", "ll"]),
        ("llama-bpe", ["<|text|>", "123", "4", "5", "Ġthe", "Ġ", "Ġ", "w", "e", "ll"]),
        ("gpt-2", ["1234", "5", "Ġthe", "Ġ", "Ġ", "w", "e", "ll"]),
    ],
)
def test_each_split_divides_words_and_numbers_in_its_way(tmp_path: Path, pre: str, words: list[str]) -> None:
    tokenizer = tokenizer_of(tmp_path, pre=pre).hugging_face
    found = tokenizer(TEXT)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found)[: len(words)] == words
    decoded = tokenizer.decode(found, skip_special_tokens=True)
    assert decoded == TEXT
    (special,) = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    (users,) = tokenizer("<user>", add_special_tokens=False)["input_ids"]
    assert (special, users) == (TOKENS.index("<|end|>"), TOKENS.index("<user>"))
    assert tokenizer.decode([special, users], skip_special_tokens=True) == "<user>"
    assert "[PAD]" not in tokenizer.get_vocab()  # a row of the embedding without a token


def test_qwens_split_is_that_of_transformers_class(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    merges: Any = [tuple(merge.split()) for merge in MERGES]  # its annotation says list[str]
    witness = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    ours = tokenizer_of(tmp_path, pre="qwen2").hugging_face
    for text in (TEXT, " they'll\t\n  12 3,4--\r\n", "e\u0301 \u2028 ４２", "".join(ByteLevel.alphabet())):
        assert ours(text)["input_ids"] == witness(text)["input_ids"]


def test_all_ends_and_the_chat_template_are_kept(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, eos_token_id=0, eot_token_id=2)
    assert tokenizer.end_tokens == (0, 2)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert tokenizer.hugging_face.chat_template == TEMPLATE
    prompt = tokenizer.render(
        [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5 is"}]
    )
    assert prompt == "<|start|>user\n2 + 3?<|end|><|start|>assistant\n5 is"


@pytest.mark.parametrize(
    ("keys", "drop", "message"),
    [
        (
            {"general.architecture": "gemma3"},
            (),
            "general.architecture = 'gemma3' is not supported; llama, qwen2",
        ),
        ({"general.type": "adapter"}, (), "general.type = 'adapter'; a whole model is needed"),
        ({"split.count": 3}, (), "one of 3 files; merge them first"),
        (
            {"llama.rope.scaling.type": "yarn"},
            (),
            "llama.rope.scaling.type = 'yarn'; only 'none' is supported",
        ),
        ({"llama.expert_count": 8}, (), "llama.expert_count = 8 is not supported"),
        ({"llama.attention.value_length": 16}, (), "llama.attention.value_length = 16; only 8 is supported"),
        ({"llama.vocab_size": 7}, (), f"llama.vocab_size = 7; only {len(TOKENS)} is supported"),
        ({"llama.attention.head_count": 3}, (), "config.json that is not valid: num_key_value_heads = 2"),
        ({"llama.block_count": 3}, (), "9 tensors are missing, the first for model.layers.2.input_layernorm"),
        ({"llama.block_count": 1}, (), "the tensor blk.1.attn_norm.weight is not supported"),
        ({"llama.feed_forward_length": 96}, (), "ffn_.*.weight has shape .*64.* but .*96.* by the metadata"),
        ({}, ("llama.block_count",), "llama.block_count is missing"),
        ({}, ("token_embd.weight",), "the tensor token_embd.weight is missing"),
        (
            {},
            ("blk.1.ffn_up.weight",),
            "1 tensors are missing, the first for model.layers.1.mlp.up_proj.weight",
        ),
        ({"tokenizer.ggml.model": "llama"}, (), "tokenizer.ggml.model = 'llama' is not supported; gpt2 is"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            (),
            "tokenizer.ggml.pre = 'tekken' is not supported; gpt-2, smollm",
        ),
        ({}, ("tokenizer.ggml.pre",), "tokenizer.ggml.pre = None is not supported"),
        ({}, ("tokenizer.ggml.tokens",), "bos_token_id = 0; the file has 0 tokens"),
        ({"tokenizer.ggml.token_type": [1, 2]}, (), "tokens, but 2 values of tokenizer.ggml.token_type"),
        (
            {"tokenizer.ggml.merges": ["x yz"]},
            (),
            r"tokenizer.ggml.merges\[0\] = 'x yz' is no merge of tokens",
        ),
        ({"tokenizer.ggml.bos_token_id": 9999}, (), "bos_token_id = 9999; the file has"),
        ({"tokenizer.ggml.eot_token_id": "end"}, (), "eot_token_id = 'end'; the file has"),
        ({"tokenizer.chat_template": 3}, (), "tokenizer.chat_template must be a text"),
        ({"tokenizer.ggml.add_eos_token": True}, (), "add_eos_token = true"),
    ],
)
def test_what_would_be_lost_or_is_wrong_is_one_line(
    tmp_path: Path, keys: dict[str, Any], drop: tuple[str, ...], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", write_model(tmp_path / "model", "llama"), F32, keys, drop)
    refused(path, message)


def test_a_rotary_scaling_in_a_tensor_is_refused(tmp_path: Path) -> None:
    """Llama 3.1's; without it the model would be another one."""
    before = write_model(tmp_path / "model", "llama") | {"rope_freqs.weight": torch.ones(8)}
    refused(write_gguf(tmp_path / "m.gguf", "llama", before), "the tensor rope_freqs.weight is not supported")


def test_a_type_without_numbers_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", write_model(tmp_path / "model", "llama"))
    tensor = b"output_norm.weight" + (1).to_bytes(4, "little") + (32).to_bytes(8, "little")
    content = path.read_bytes()
    assert content.count(tensor) == 1
    for kind, message in ((24, "which the package gguf cannot dequantise"), (99, "has quantisation 99")):
        path.write_bytes(content.replace(tensor + bytes(4), tensor + kind.to_bytes(4, "little")))
        refused(path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"GGML" + bytes(100), "no GGUF file: it begins with b'GGML'"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "GGUF version 50331648; 2 and 3 are supported"),  # big-endian
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "items are announced where"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "general.architecture = None is not supported"),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", message)


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (b"general.architecture", b"general.architectur\n", r"a key is 'general.architectur\\n'"),
        (b"output_norm.weight", b"output\nnorm.weight", r"a tensor's name is 'output\\nnorm.weight'"),
    ],
)
def test_a_name_that_breaks_the_line_is_shown_escaped(
    tmp_path: Path, name: bytes, broken: bytes, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", write_model(tmp_path / "model", "llama"))
    path.write_bytes(path.read_bytes().replace(name, broken))
    refused(path, message)


def test_a_file_that_is_cut_off_anywhere_is_one_line(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "llama", write_model(tmp_path / "model", "llama")).read_bytes()
    for size in [*range(1, 400, 7), *range(400, len(whole), len(whole) // 40), len(whole) - 40]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole)
        refused(cut(path, size), ".")


def refused(path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        convert(path, path.parent / "out")
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert not (path.parent / "out").exists()


def test_the_command_writes_a_folder_and_overwrites_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", write_model(tmp_path / "model", "llama"))
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "a Hugging Face folder of" in result.stdout
    again = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert isinstance(again.exception, ModelError)
    assert "exists: nothing is overwritten" in str(again.exception)
