"""The files of a model folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from benchmarks.fuzz.loop import Reader
from benchmarks.fuzz.readers import MARK, emptied, joined, write_files
from tests.support.model_folders import SMALL
from treepo.data.model_config import CONFIG, GENERATION_CONFIG
from treepo.data.tokenizer import TOKENIZER_CONFIG, end_tokens, load_tokenizer
from treepo.data.weight_headers import INDEX, WEIGHTS, read_weight_headers

_CONFIG: dict[str, Any] = SMALL | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "layer_types": ["full_attention", "full_attention"],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}


def model_config(folder: Path) -> Reader:
    """config.json and generation_config.json, as the trainer and every command read them."""
    from megatron_bridge.architecture import read_architecture, tensor_shapes

    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    }
    generation = {"eos_token_id": [1, 2], "temperature": 0.7}
    seeds = [
        joined(
            {CONFIG: json.dumps(_CONFIG | more).encode(), GENERATION_CONFIG: json.dumps(generation).encode()}
        )
        for more in ({}, {"rope_parameters": _LLAMA3}, experts, {"text_config": _CONFIG})
    ]
    words = tuple(f'"{key}": '.encode() for key in {**_CONFIG, **experts, **_LLAMA3, "auto_map": 0})

    def read(data: bytes) -> object:
        with emptied(folder / "model") as model:
            write_files(data, model, (CONFIG, GENERATION_CONFIG))
            end_tokens(model, 1)
            return tensor_shapes(read_architecture(model))

    return Reader("model_config", read, seeds, words, share=0.2)


def weights(folder: Path) -> Reader:
    """Headers of safetensors, and their index."""
    one = save({"a": np.zeros((2, 3), np.float32), "b.weight": np.ones(4, np.float16)})
    two = save({"c": np.zeros((1,), np.int64)})
    index = json.dumps(
        {"weight_map": {"a": "m-1.safetensors", "b.weight": "m-1.safetensors", "c": "m-2.safetensors"}}
    )
    seeds = [
        joined({WEIGHTS: one}),
        joined({INDEX: index.encode(), "m-1.safetensors": one, "m-2.safetensors": two}),
    ]
    names = (WEIGHTS, INDEX, "m-1.safetensors", "m-2.safetensors", "consolidated.safetensors")
    words = (
        b'"dtype":"F32"',
        b'"shape":[9223372036854775807]',
        b'"data_offsets":[0,24]',
        b'"__metadata__"',
        MARK + b"m-2.safetensors\x1f",
        b'"/etc/m.safetensors"',
        b'"../m.safetensors"',
        b'"weight_map"',
    )

    def read(data: bytes) -> object:
        with emptied(folder / "model") as model:
            write_files(data, model, names)
            return read_weight_headers(model)

    return Reader("weights", read, seeds, words)


def tokenizer(folder: Path) -> Reader:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    from treepo.toy.byte_tokenizer import byte_tokenizer

    byte_tokenizer(4096).hugging_face.save_pretrained(folder / "seed")
    files = {name: (folder / "seed" / name).read_bytes() for name in ("tokenizer.json", TOKENIZER_CONFIG)}
    seeds = [joined(files), joined(files | {"special_tokens_map.json": b'{"eos_token": "x"}'})]
    names = (*files, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
    words = (
        b'"type": "ByteLevel"',
        b'"type": "BPE"',
        b'"Regex": "(a+)+$"',
        b'"id": 4294967295',
        b'"merges": []',
        b'"vocab": {}',
        b'"added_tokens": []',
        b'"tokenizer_class": "LlamaTokenizer"',
        b'"auto_map": {}',
    )

    def read(data: bytes) -> object:
        with emptied(folder / "model") as model:
            (model / CONFIG).write_text(json.dumps(_CONFIG))
            write_files(data, model, names)
            return load_tokenizer(model).end_tokens

    return Reader("tokenizer", read, seeds, words, share=0.05)


def gguf(folder: Path) -> Reader:
    """A GGUF file's header, and the config and tokenizer made of it."""
    from megatron_bridge.gguf_model import open_gguf
    from tests.support.gguf_files import Q8_0, write_gguf, write_model

    made = write_gguf(folder / "seed.gguf", "llama", write_model(folder / "seed", "llama"), Q8_0)
    whole = made.read_bytes()
    words = (
        b"llama.rope.freq_base",
        b"tokenizer.ggml.pre",
        b"general.alignment",
        b"\xff" * 8,
        b"\x09\x00\x00\x00",
    )

    def read(data: bytes) -> object:
        with emptied(folder / "described") as described:
            (folder / "m.gguf").write_bytes(data)
            return open_gguf(folder / "m.gguf", described).tensor_count

    return Reader("gguf", read, [whole], words, share=0.05)
