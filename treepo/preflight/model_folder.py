"""Checks a model folder as a whole, before anything starts: the one check of every command that reads one.

Names, shapes and dtypes come from the headers of the files; no weights are read and no code of the folder is
run. Each fault is one line with the folder, the file, the key and its value.
"""

from pathlib import Path

from treepo.data.model_config import (
    CONFIG,
    GENERATION_CONFIG,
    read_json_object,
    read_model_config,
    shown,
    token_ids,
    wrong_value,
)
from treepo.data.tokenizer import TOKENIZER_CONFIG, check_vocabulary_files, has_tokenizer, load_tokenizer
from treepo.data.weight_headers import has_weights, read_weight_headers
from treepo.errors import ModelError, one_line

_GENERATION_NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "bos_token_id", "pad_token_id"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams"),
)


def check_files(folder: Path) -> None:
    """The quick part of the check of a folder to serve: its files, without torch and transformers."""
    read_model_config(folder)
    read_weight_headers(folder)
    check_vocabulary_files(folder)


def check_served_folder(folder: Path, *, trained: bool = False) -> None:
    """Raise ModelError unless an engine can serve the folder: its config and weights agree.

    trained: the trainer must be able to build the model too. `load_tokenizer` checks the tokenizer.
    """
    from megatron_bridge.architecture import UntrainableError, read_architecture

    check_class(folder)
    try:
        architecture = read_architecture(folder)
    except UntrainableError:
        if trained:
            raise
        from sglang_rollout.served_tensors import check_tensors

        check_tensors(folder)
    else:
        from megatron_bridge.hf_tensors import check_tensors

        check_tensors(folder, architecture)
    check_generation_config(folder)


def check_present_parts(folder: Path) -> None:
    """As `check_served_folder` for a trained model, if the folder may lack the weights or the tokenizer."""
    from megatron_bridge.architecture import read_architecture
    from megatron_bridge.hf_tensors import check_tensors

    architecture = read_architecture(folder)
    if read_model_config(folder).get("architectures") is not None:
        check_class(folder)
    if has_weights(folder):
        check_tensors(folder, architecture)
    check_generation_config(folder)
    if (folder / TOKENIZER_CONFIG).is_file() or has_tokenizer(folder):
        load_tokenizer(folder)


def check_class(folder: Path) -> None:
    """Raise ModelError unless config.json names the class for text of a family that the trainer knows.

    SGLang builds the class that is named.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from megatron_bridge.hf_weight_map import FAMILIES

    config = read_model_config(folder)
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        return
    found, needed = config.get("architectures"), [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    if found != needed:
        needed = f"{shown(needed)} for model_type = {model_type}"
        raise ModelError(f"{folder / CONFIG}: {wrong_value('architectures', found, needed)}")


def check_generation_config(folder: Path) -> None:
    """Raise ModelError if SGLang could not read generation_config.json, which a folder may lack."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return
    content = read_json_object(path)
    token_ids(content.get("eos_token_id"), path)
    for key in _GENERATION_NUMBERS:
        found = content.get(key)
        if found is not None and (isinstance(found, bool) or not isinstance(found, (int, float))):
            raise ModelError(f"{path}: {wrong_value(key, found, 'a number or null')}")
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its values are checked in many ways
        raise ModelError(f"{path}: transformers refuses it: {one_line(error)[:300]}") from error
