"""One check of a model folder for every command: a fault is one line, a harmless extra is let through."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sglang_rollout.weight_update import checkpoint_shapes
from tests.support.model_folders import (
    INDEX,
    POINTER,
    SMALL,
    Change,
    beside,
    both,
    config,
    sharded,
    tensors,
    text,
    truncated,
    without,
)
from tests.support.preflight_commands import COMMANDS, ENGINES, convert, run
from tests.support.tiny import write_tiny_qwen3_moe
from treepo.data.tokenizer import load_tokenizer
from treepo.errors import ModelError, TreepoError
from treepo.preflight.model_folder import check_present_parts, check_served_folder

LM_HEAD, NORM, UP = "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"

FAULTS: dict[str, tuple[Change, str]] = {
    # The files.
    "a shard is missing": (
        both(sharded(), without("model-2.safetensors")),
        r"model: model\.safetensors\.index\.json names model-2\.safetensors for model\..* and \d+ more, but",
    ),
    "a link to a shard is broken": (
        both(
            sharded(), without("model-2.safetensors"), lambda f: (f / "model-2.safetensors").symlink_to("x")
        ),
        r"model: model\.safetensors\.index\.json names model-2\.safetensors for ",
    ),
    "a shard is not in the index": (
        both(sharded(), beside("model-3.safetensors")),
        r"model: model-3\.safetensors: a second set of weights",
    ),
    "the index is incomplete": (
        sharded(lambda places: places.pop(NORM)),
        r"model: model\.norm\.weight is in model-2\.safetensors, but not in model\.safetensors\.index\.json",
    ),
    "the index names another file": (
        sharded(lambda places: places.update({NORM: "model-1.safetensors"})),
        r"names model-1\.safetensors for model\.norm\.weight, which is in model-2\.safetensors",
    ),
    "the index names a tensor that is nowhere": (
        sharded(lambda places: places.update({"x.weight": "model-1.safetensors"})),
        r"names model-1\.safetensors for x\.weight, which is not in it",
    ),
    "the index names a file elsewhere": (
        sharded(lambda places: places.update({NORM: "../model-1.safetensors"})),
        r'index\.json: weight_map has "\.\./model-1\.safetensors" for model\.norm\.weight',
    ),
    "the index names a file that no disk holds": (
        sharded(lambda places: places.update({NORM: "x" * 300 + ".safetensors"})),
        r"index\.json: weight_map has \"xxx",
    ),
    "the index is no index": (both(sharded(), text(INDEX, "[]")), r"index\.json: a JSON object is needed"),
    "the index has no map": (both(sharded(), text(INDEX, "{}")), r"index\.json: weight_map = null"),
    "a tensor is in two files": (
        both(
            sharded(),
            lambda f: save_file({NORM: torch.zeros(64), "a": torch.zeros(1)}, f / "model-1.safetensors"),
        ),
        r"model: model\.norm\.weight is both in model-1\.safetensors and in model-2\.safetensors",
    ),
    "there is no index": (
        both(sharded(), without(INDEX)),
        r"model: it has model-1\.safetensors and 1 more, but no",
    ),
    "older weights are beside": (
        beside("older.safetensors"),
        r"model: older\.safetensors: a second set of weights",
    ),
    "whole weights are beside an index": (
        both(sharded(), beside("model.safetensors")),
        r"model: model\.safetensors: a second set of weights, where model\.safetensors\.index\.json",
    ),
    "weights of Mistral's format are loaded too": (
        both(beside("consolidated.safetensors"), beside("value_head.safetensors")),
        r"model: consolidated\.safetensors and 1 more: a second set of weights",
    ),
    "an adapter is beside": (
        beside("adapter_model.safetensors"),
        r"adapter_model\.safetensors: an adapter beside",
    ),
    "an adapter's config is beside": (
        text("adapter_config.json", "{}"),
        r"adapter_config\.json: an adapter beside",
    ),
    "weights are truncated": (
        truncated("model.safetensors"),
        r"model/model\.safetensors: not a readable safetensors file",
    ),
    "weights are empty": (
        truncated("model.safetensors", 0),
        r"model\.safetensors: not a readable safetensors file",
    ),
    "weights are a pointer": (
        text("model.safetensors", POINTER),
        r"model/model\.safetensors: a Git LFS pointer",
    ),
    "the tokenizer is a pointer": (
        text("tokenizer.json", POINTER),
        r"model/tokenizer\.json: a Git LFS pointer",
    ),
    "the template is a pointer": (
        text("chat_template.jinja", POINTER),
        r"chat_template\.jinja: a Git LFS pointer",
    ),
    "weights are a folder": (
        both(without("model.safetensors"), lambda f: (f / "model.safetensors").mkdir()),
        r"model/model\.safetensors: a folder, or a link to a file that is not there; download",
    ),
    "weights are a broken link": (
        both(without("model.safetensors"), lambda f: (f / "model.safetensors").symlink_to("nowhere")),
        r"model/model\.safetensors: a folder, or a link to a file that is not there",
    ),
    # The tensors.
    "no output layer": (
        tensors(lambda t: t.pop(LM_HEAD)),
        r"model: no file has lm_head\.weight, though config\.json says .* tie_word_embeddings = false",
    ),
    "a tensor is missing": (
        tensors(lambda t: t.pop(UP)),
        r"model: no file has model\.layers\.1\.mlp\.up_proj",
    ),
    "a value head": (
        tensors(lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 64)})),
        r"model: model\.safetensors has v_head\.summary\.weight, which no model with this config\.json has",
    ),
    "an adapter within": (
        tensors(lambda t: t.update({UP.replace("weight", "lora_A.weight"): torch.zeros(8, 64)})),
        r"model\.safetensors has model\.layers\.1\.mlp\.up_proj\.lora_A\.weight, which no model",
    ),
    "biases of another family": (
        tensors(lambda t: t.update({NORM.replace("weight", "bias"): torch.zeros(64)})),
        r"model\.safetensors has model\.norm\.bias",
    ),
    "names without their prefix": (
        tensors(lambda t: t.update({NORM.removeprefix("model."): t.pop(NORM)})),
        r"no file has model\.norm\.weight",
    ),
    "names of a wrapper": (
        tensors(lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)]),
        r"model: no tensor is named model\.layers\.0.*; the first is module\.lm_head\.weight",
    ),
    "fewer layers in the config": (
        config(num_hidden_layers=1, layer_types=["full_attention"]),
        r"model: num_hidden_layers = 1 in config\.json, but the weights have 2",
    ),
    "more layers in the config": (
        config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"model: num_hidden_layers = 3 in config\.json, but the weights have 2",
    ),
    "a larger vocabulary in the config": (
        config(vocab_size=1024),
        r"\.weight has shape \[512, 64\] in model\.safetensors, but \[1024, 64\] by config\.json \(vocab",
    ),
    "another width of the MLP": (
        config(intermediate_size=100),
        r"has shape \[64, 96\] in model\.\w+, but \[64, 100\] by config\.json \(intermediate",
    ),
    "other heads": (
        config(num_key_value_heads=4),
        r"k_proj\.\w+ has shape \[32.* but \[64.* \(num_key_value_heads = 4, head_dim = 16",
    ),
    "eight bits without a config of them": (
        tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        r"up_proj\.weight is F8_E4M3 in model\.safetensors; F32, BF16, F16 are supported",
    ),
    # config.json and generation_config.json.
    "not JSON": (text("config.json", "{"), r"model/config\.json: not JSON"),
    "a list": (text("config.json", "[]"), r"model/config\.json: a JSON object is needed, not list"),
    "no family": (config(drop=("model_type",)), r"model/config\.json: model_type is missing"),
    "a family of null": (config(model_type=None), r"model/config\.json: model_type = null; it must be"),
    "another class": (
        config(architectures=["Qwen2ForSequenceClassification"]),
        r'config\.json: architectures = \["Qwen2ForSequenceClassification"\]; it must',
    ),
    "quantised": (
        config(quantization_config={"quant_method": "fp8"}),
        r'config\.json: quantization_config = \{"quant_method": "fp8"\}; quantised weights can be neither',
    ),
    "quantised by ModelOpt": (
        text("hf_quant_config.json", "{}"),
        r"hf_quant_config\.json: it describes quantised",
    ),
    "window of null": (
        config(use_sliding_window=None),
        r"config\.json: use_sliding_window = null; it must be true",
    ),
    "tie of null": (
        config(tie_word_embeddings=None),
        r"config\.json: tie_word_embeddings = null; it must be true",
    ),
    "positions as text": (
        config(max_position_embeddings="4096"),
        r'config\.json: max_position_embeddings = "4096"; it must be a whole number',
    ),
    "NaN": (
        text("config.json", '{"rms_norm_eps": NaN}'),
        r"config\.json: not JSON: rms_norm_eps = nan; a finite",
    ),
    "theta of null": (
        config(drop=("rope_parameters",), rope_theta=None),
        r"config\.json: rope_theta = null; it must be a number above 0",
    ),
    "half of llama3's scaling": (
        config(drop=("rope_parameters",), rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        r"config\.json: rope_scaling = .*; rope_type = llama3 needs low_freq_factor",
    ),
    "heads that groups do not divide": (
        config(num_key_value_heads=3),
        r"num_key_value_heads = 3; it must be a div",
    ),
    "end token as text": (
        config("generation_config.json", eos_token_id="1"),
        r'model/generation_config\.json: eos_token_id = "1"; it must be a token\'s number, or a list of them',
    ),
    "end tokens as text": (
        config(eos_token_id=["1"]),
        r'model/config\.json: eos_token_id = \["1"\]; it must be',
    ),
    "end token of true": (config(eos_token_id=True), r"model/config\.json: eos_token_id = true; it must be"),
    "end token beyond the vocabulary": (
        config("generation_config.json", eos_token_id=[1, 512]),
        r"generation_config\.json: eos_token_id = 512, but the embedding has only 512 rows",
    ),
    "padding beyond the vocabulary": (
        config(pad_token_id=512),
        r"model/config\.json: pad_token_id = 512, but the embedding has only 512 rows",
    ),
    "code of a number": (
        config(auto_map={"AutoConfig": 3}),
        r'model/config\.json: auto_map = \{"AutoConfig": 3\}; it must be an object of names',
    ),
    "a factor as text": (
        config(rope_parameters={"rope_type": "linear", "factor": "2"}),
        r'model/config\.json: rope_parameters\.factor = "2"; it must be a number above 0',
    ),
    "generation config of text": (
        text("generation_config.json", '"x"'),
        r"generation_config\.json: a JSON object",
    ),
    "a length as text": (
        config("generation_config.json", max_new_tokens="99"),
        r'model/generation_config\.json: max_new_tokens = "99"; it must be a number or null',
    ),
    "a cache that nobody knows": (
        config("generation_config.json", cache_implementation="x"),
        r"generation_config\.json: transformers refuses it: Invalid `cache_implementation`",
    ),
    # The tokenizer.
    "tokenizer_config.json alone": (
        without("tokenizer.json"),
        r"no vocabulary of a tokenizer beside its tokenizer_co",
    ),
    "a broken tokenizer": (truncated("tokenizer.json"), r"model/tokenizer\.json: not JSON: "),
    "a tokenizer without a model": (
        config("tokenizer.json", model=None),
        r"model: its tokenizer cannot be loaded: \w+Error: .*; download it again",
    ),
    "a tokenizer of another kind": (
        text("tokenizer_config.json", "[]"),
        r"model/tokenizer_config\.json: a JSON",
    ),
    "tokens beyond the embedding": (
        lambda f: add_tokens(f, 300),
        r"model: its tokenizer has token \d+, '<more_\d+>', but the embedding only 512 rows \(vocab",
    ),
}


def add_tokens(folder: Path, count: int) -> None:
    tokenizer = load_tokenizer(folder).hugging_face
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<more_{i}>" for i in range(count)]})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses_a_fault_in_one_line(folder: Path, fault: str) -> None:
    change, said = FAULTS[fault]
    change(folder)
    for command in COMMANDS:
        with pytest.raises(TreepoError, match=said) as raised:
            run(command)
        assert "\n" not in str(raised.value)
        assert raised.value.exit_code == 2


HARMLESS: dict[str, Change] = {
    "nothing": lambda _: None,
    "two files": sharded(),
    "rotary buffers": tensors(
        lambda t: t.update(
            {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for n in (0, 1)}
        )
    ),
    "the index of rotary buffers": sharded(
        lambda places: places.update({"model.layers.0.self_attn.rotary_emb.inv_freq": "model-1.safetensors"})
    ),
    "weights of torch": both(
        text("pytorch_model.bin", "x"), text("optimizer.pt", "x"), text("training_args.bin", "x")
    ),
    "an original": lambda f: (f / "original").mkdir() or beside("original/consolidated.safetensors")(f),
    "Mistral's format beside one file": beside("consolidated.safetensors"),
    "Mistral's format beside two files": both(sharded(), beside("consolidated-1.safetensors")),
    "pages": both(
        text("README.md", POINTER), text(".gitattributes", "*.bin filter=lfs"), text("x.py", "1/0")
    ),
    "half precision": tensors(lambda t: t.update({name: tensor.half() for name, tensor in t.items()})),
    "code that its family does not need": both(
        config(auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}), text("own.py", "1/0")
    ),
    "older names of keys": config(
        drop=("rope_parameters", "layer_types", "dtype"),
        rope_theta=10000.0,
        rope_scaling=None,
        torch_dtype="float32",
    ),
}


@pytest.mark.parametrize("extra", HARMLESS)
def test_what_real_folders_have_is_let_through(folder: Path, extra: str) -> None:
    before = checkpoint_shapes(folder)
    HARMLESS[extra](folder)
    for command in ENGINES:
        run(command)
    check_present_parts(folder)
    assert checkpoint_shapes(folder) == before, "what an update of the engine must have"


def test_convert_takes_what_is_let_through_and_drops_nothing(folder: Path) -> None:
    HARMLESS["rotary buffers"](folder)
    run(convert)
    tensors(lambda t: t.update({UP: t[UP].half()}))(folder)
    with pytest.raises(
        ModelError, match=r"several dtypes: float16 \(.*up_proj.weight\), float32 \(.*\); one"
    ):
        run(convert)


def test_a_tied_model_may_store_its_output_layer_again(folder: Path) -> None:
    config(tie_word_embeddings=True)(folder)
    check_served_folder(folder, trained=True)
    tensors(lambda t: t.pop(LM_HEAD))(folder)
    check_served_folder(folder, trained=True)
    assert LM_HEAD not in checkpoint_shapes(folder)


def test_plan_needs_neither_weights_nor_tokenizer(folder: Path) -> None:
    without("model.safetensors", "tokenizer.json", "tokenizer_config.json")(folder)
    check_present_parts(folder)
    for command in ENGINES:
        with pytest.raises(TreepoError, match=r"model: no \*\.safetensors in the folder"):
            run(command)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_what_transformers_writes_is_let_through(folder: Path, family: str) -> None:
    without("model.safetensors")(folder)
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(folder)
    elif family == "qwen3":
        Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(folder, max_shard_size="50KB")
    else:
        write_tiny_qwen3_moe(folder, vocab_size=512)
    check_served_folder(folder, trained=True)


def test_experts_are_counted(folder: Path) -> None:
    without("model.safetensors")(folder)
    write_tiny_qwen3_moe(folder, vocab_size=512)
    config(num_local_experts=6)(folder)
    with pytest.raises(ModelError, match=r"num_local_experts = 6 in config\.json, but the weights have 4"):
        check_served_folder(folder)
