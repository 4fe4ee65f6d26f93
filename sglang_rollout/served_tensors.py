"""Compares the tensors of a model folder with its config.json, for families that only the engine knows.

transformers loads the folder onto torch's meta device, with the headers in the place of the weights. Its own
tables say which names are old spellings, tied to others, or harmless.
"""

from pathlib import Path
from typing import Any

from treepo.data.model_config import CONFIG, load_hf_config, read_model_config, shown, wrong_value
from treepo.data.weight_headers import TensorHeader, read_weight_headers
from treepo.errors import ModelError, one_line

_SPECULATIVE = "mtp."  # weights of multi-token prediction, which no sampling here uses


def check_known(folder: Path) -> None:
    """Raise ModelError unless SGLang serves config.json's model without running code of the folder."""
    from transformers import CONFIG_MAPPING

    config = read_model_config(folder)
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        import sglang.srt.utils.hf_transformers.common  # noqa: F401  # adds SGLang's own families

        if model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"{folder / CONFIG}: model_type = {shown(model_type)} is known to neither "
                "transformers nor SGLang"
                + ("; the folder's own code (auto_map) is never run" if config.get("auto_map") else "")
            )


def check_tensors(folder: Path) -> None:
    """Raise ModelError if a tensor is missing, has the wrong shape or belongs to no part of the model.

    Names and shapes are not checked for a model that SGLang knows and transformers does not.
    """
    check_known(folder)
    config, headers = load_hf_config(folder), read_weight_headers(folder)
    kind = _model_class(folder, config)
    if kind is None:
        return
    try:
        loaded = _load_headers(kind, config, headers)
    except Exception as error:  # each family's class checks in its own way
        raise ModelError(f"{folder}: transformers cannot build the model: {one_line(error)[:300]}") from error
    (name, *_) = config.architectures or ("",)
    for broken in sorted(loaded.conversion_errors):
        raise ModelError(f"{folder}: the parts of {broken} do not fit together, or some are missing")
    for missing in sorted(loaded.missing_keys):
        raise ModelError(f"{folder}: no file has {missing}, which {name} needs ({CONFIG})")
    for tensor, found, expected in sorted(loaded.mismatched_keys):
        raise ModelError(
            f"{folder}: {tensor} has shape {list(found)}, but {list(expected)} by {CONFIG} ({name})"
        )
    for extra in sorted(loaded.unexpected_keys):
        if _SPECULATIVE not in extra:
            raise ModelError(f"{folder}: it has {extra}, which no {name} with this {CONFIG} has")


def _model_class(folder: Path, config: Any) -> Any:
    """The class of the model in transformers, or None if it has none."""
    import transformers

    names = config.architectures
    if not names:
        raise ModelError(f"{folder / CONFIG}: {wrong_value('architectures', names, 'the name of a class')}")
    kind = getattr(transformers, names[0], None)
    if kind is None and getattr(config, "auto_map", None):
        raise ModelError(
            f"{folder / CONFIG}: architectures = {shown(names)} is no class of transformers; "
            "the folder's own code (auto_map) is never run"
        )
    return kind


def _load_headers(kind: Any, config: Any, headers: dict[str, TensorHeader]) -> Any:
    """Report what is missing, mismatched and unexpected."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.float32, attn_implementation="eager")
    weights = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    spellings: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=spellings)
    loaded, _ = convert_and_load_state_dict_in_model(model, weights, settings, None)
    model.mark_tied_weights_as_initialized(loaded)
    model._adjust_missing_and_unexpected_keys(loaded)
    return loaded
