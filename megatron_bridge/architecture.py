"""Reads the architecture of a Hugging Face model, and checks that the trainer and a layout support it."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from megatron_bridge.hf_weight_map import FAMILIES, OUTPUT, Family, Rule, expand
from megatron_bridge.rotary import inverse_frequency
from megatron_bridge.tensor_surgery import Dimensions
from treepo.config.trainer import ParallelConfig
from treepo.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts that replace the MLP in the sparse layers (`Dimensions.sparse_layers`)."""

    intermediate: int
    per_token: int
    normalised: bool  # the probabilities of a token's experts are scaled to sum to 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """The part of config.json that the trainer needs."""

    family: Family
    dimensions: Dimensions
    hidden: int
    intermediate: int
    heads: int
    norm_epsilon: float
    max_positions: int
    tied: bool
    frequency: Tensor  # float32 [head_dim / 2], rotary radians per position
    experts: Experts | None = None

    def weight_rules(self) -> list[Rule]:
        """The family's table with every layer and expert filled in; tied embeddings have no output layer."""
        rules = expand(self.family.rules, self.dimensions)
        return [rule for rule in rules if not (self.tied and rule.parameter == OUTPUT)]


def read_architecture(folder: Path) -> Architecture:
    """Read `folder`/config.json. Raises ModelError if its family or one of its features is not supported."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{folder}: model_type {config.model_type!r} is not supported; {', '.join(FAMILIES)} are"
        )
    _check_features(folder, config)
    sparse_layers = _sparse_layers(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        family=FAMILIES[config.model_type],
        dimensions=Dimensions(
            config.num_hidden_layers,
            config.num_key_value_heads,
            head_dim,
            config.vocab_size,
            config.num_experts if sparse_layers else 0,
            sparse_layers,
        ),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        norm_epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        frequency=inverse_frequency(config.rope_parameters, head_dim),
        experts=_experts(folder, config) if sparse_layers else None,
    )


def _sparse_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers with experts, by the rule of transformers' decoder layers."""
    if not getattr(config, "num_experts", 0):
        return ()
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )


def _experts(folder: Path, config: PreTrainedConfig) -> Experts:
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise ModelError(
            f"{folder}: num_experts_per_tok = 1 with norm_topk_prob = true is not supported: the one "
            "probability is always 1, so the router would learn nothing"
        )
    return Experts(config.moe_intermediate_size, config.num_experts_per_tok, config.norm_topk_prob)


def _check_features(folder: Path, config: PreTrainedConfig) -> None:
    expected = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    for name, value in expected.items():
        if getattr(config, name, value) != value:
            raise ModelError(f"{folder}: {name} = {getattr(config, name)!r}; only {value!r} is supported")


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Check that the layout divides the model. Raises ConfigError with the arithmetic."""
    dimensions = architecture.dimensions
    stages = "trainer.parallel.pipeline"
    if parallel.virtual_pipeline > 1:
        stages += f" x virtual_pipeline = {parallel.pipeline} x {parallel.virtual_pipeline}"
    parts = [
        ("trainer.parallel.tensor", parallel.tensor, "attention heads", architecture.heads),
        ("trainer.parallel.tensor", parallel.tensor, "key-value heads", dimensions.groups),
        (stages, parallel.pipeline * parallel.virtual_pipeline, "layers", dimensions.layers),
    ]
    if len(dimensions.sparse_layers) < dimensions.layers:
        parts.append(
            ("trainer.parallel.tensor", parallel.tensor, "rows of the MLP", architecture.intermediate)
        )
    if dimensions.experts:
        parts.append(("trainer.parallel.expert", parallel.expert, "experts", dimensions.experts))
    for name, ranks, what, size in parts:
        if size % ranks:
            raise ConfigError(
                f"{name} = {ranks} does not divide the model's {size} {what} (remainder {size % ranks})"
            )
    if parallel.expert > 1 and not dimensions.experts:
        raise ConfigError(f"trainer.parallel.expert = {parallel.expert}, but the model has no experts")
    if dimensions.experts and parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"trainer.parallel.tensor = {parallel.tensor} with a model that has experts needs "
            "trainer.parallel.sequence = true: Megatron-Core sends each rank's own tokens to the experts"
        )


def check_transformer_impl(transformer_impl: str) -> None:
    """Raise ConfigError if `te` is configured and Transformer Engine is not installed."""
    if transformer_impl == "te" and find_spec("transformer_engine") is None:
        raise ConfigError(
            "trainer.transformer_impl = te, but transformer_engine is not installed; "
            "install it, or use auto or local"
        )


def check_same_model(folder: Path, model: Path) -> None:
    """Raise ModelError unless `folder` and `model` have the same architecture."""
    ours, theirs = read_architecture(model), read_architecture(folder)
    if ours.family != theirs.family:
        raise ModelError(f"{folder}: not the model of {model}: it belongs to another family")
    for name in ("dimensions", "hidden", "intermediate", "heads", "tied", "experts"):
        expected, found = getattr(ours, name), getattr(theirs, name)
        if expected != found:
            raise ModelError(f"{folder}: not the model of {model}: {name} is {found}, not {expected}")
