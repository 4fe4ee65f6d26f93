"""Reads the architecture of a Hugging Face model, and checks that the trainer and a layout support it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from megatron_bridge.config_values import check_values
from megatron_bridge.hf_weight_map import FAMILIES, OUTPUT, Family, Rule, expand
from megatron_bridge.lacking_parts import lacking_part
from megatron_bridge.rotary import ROPE_TYPES, inverse_frequency
from megatron_bridge.tensor_surgery import Dimensions
from treepo.config.trainer import MLP_PROJECTIONS, LoraConfig, ParallelConfig
from treepo.data.model_config import CONFIG, load_hf_config, read_model_config, shown
from treepo.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts that replace the MLP in the sparse layers (`Dimensions.sparse_layers`)."""

    intermediate: int
    per_token: int
    normalised: bool  # the probabilities of a token's experts are scaled to sum to 1
    shared: int = 0  # rows of the shared expert, if the family has one


@dataclass(frozen=True, slots=True)
class Architecture:
    """The part of config.json that the trainer needs."""

    model_type: str  # a key of FAMILIES
    dimensions: Dimensions
    hidden: int
    intermediate: int
    heads: int
    norm_epsilon: float
    max_positions: int
    tied: bool
    frequency: Tensor  # float32 [head_dim / 2], rotary radians per position
    experts: Experts | None = None
    attention_bias: bool = False  # in families that have it as an option

    @property
    def family(self) -> Family:
        family = FAMILIES[self.model_type]
        return family.with_attention_bias() if self.attention_bias else family

    def weight_rules(self) -> list[Rule]:
        """The family's table with every layer and expert filled in; tied embeddings have no output layer."""
        rules = expand(self.family.rules, self.dimensions)
        return [rule for rule in rules if not (self.tied and rule.parameter == OUTPUT)]


class UntrainableError(ModelError):
    """A model that the trainer cannot build, though an engine may serve it."""


def read_architecture(folder: Path) -> Architecture:
    """Read `folder`/config.json.

    Raises UntrainableError if its family or one of its features is not supported, ModelError for a value that
    no model can have.
    """
    written = read_model_config(folder)
    if written["model_type"] not in FAMILIES:
        lacking = lacking_part(written)
        why = f" (the trainer has no {lacking})" if lacking else ""
        raise UntrainableError(
            f"{folder / CONFIG}: model_type = {shown(written['model_type'])} is not supported{why}; "
            f"{', '.join(FAMILIES)} are"
        )
    check_values(folder, written)
    config = load_hf_config(folder)
    # Not the config's: transformers calls a Mistral with `layer_types` a Ministral.
    family = FAMILIES[written["model_type"]]
    _check_features(folder, config, family)
    sparse_layers = _sparse_layers(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        model_type=written["model_type"],
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
        experts=_experts(folder, config, family) if sparse_layers else None,
        attention_bias=getattr(config, "attention_bias", False),
    )


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's Hugging Face tensors as in transformers."""
    dimensions, hidden = architecture.dimensions, architecture.hidden
    queries, keys = architecture.heads * dimensions.head_dim, dimensions.groups * dimensions.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    rows |= {"gate": dimensions.experts, "shared_expert_gate": 1}
    rows |= dict.fromkeys(("embed_tokens", "lm_head"), dimensions.vocabulary)
    norms = {"q_norm": dimensions.head_dim, "k_norm": dimensions.head_dim}

    def shape(name: str) -> tuple[int, ...]:
        *path, module, kind = name.split(".")
        if "norm" in module:
            return (norms.get(module, hidden),)
        inner = _inner(architecture, path)
        if kind == "bias":
            return (rows[module],)
        if module in ("o_proj", "down_proj"):
            return (hidden, queries if module == "o_proj" else inner)
        return (rows.get(module, inner), hidden)

    return {name: shape(name) for rule in architecture.weight_rules() for name in rule.tensors}


def _inner(architecture: Architecture, path: Sequence[str]) -> int:
    """Rows of the MLP that a tensor's name is in: a layer's own, an expert's or the shared expert's."""
    experts = architecture.experts
    if experts is not None and "experts" in path:
        return experts.intermediate
    return experts.shared if experts is not None and "shared_expert" in path else architecture.intermediate


def _sparse_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers with experts, by the rule of transformers' decoder layers."""
    if not getattr(config, "num_experts", 0):
        return ()
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )


def _experts(folder: Path, config: PreTrainedConfig, family: Family) -> Experts:
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise UntrainableError(
            f"{folder / CONFIG}: num_experts_per_tok = 1 with norm_topk_prob = true is not supported: the "
            "one probability is always 1, so the router would learn nothing"
        )
    return Experts(
        config.moe_intermediate_size,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.shared_expert_intermediate_size if family.shared_expert else 0,
    )


def _check_features(folder: Path, config: PreTrainedConfig, family: Family) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UntrainableError(
            f"{folder / CONFIG}: rope_type = {shown(kind)} is not supported; {', '.join(ROPE_TYPES)} are"
        )
    for name, value in _FEATURES.items():
        if name == "attention_bias" and family.optional_bias:
            continue
        found = rope.get(name, getattr(config, name, value))
        if found != value:
            raise UntrainableError(
                f"{folder / CONFIG}: {name} = {shown(found)}; only {shown(value)} is supported"
            )
    if window := getattr(config, "sliding_window", None):
        raise UntrainableError(
            f"{folder / CONFIG}: sliding_window = {shown(window)}; only null is supported, because the "
            "trainer attends to the whole context"
        )
    if getattr(config, "num_experts", 0) and not hasattr(type(config)(), "num_experts"):
        raise UntrainableError(
            f"{folder / CONFIG}: num_experts = {shown(config.num_experts)}; {config.model_type} has none"
        )
    for kind in getattr(config, "layer_types", None) or ():
        if kind != "full_attention":
            raise UntrainableError(
                f"{folder / CONFIG}: layer_types has {shown(kind)}; only full_attention is supported"
            )


_FEATURES = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,
    "qkv_bias": True,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    # The rest are in config.json where a model differs from its family, and SGLang heeds them.
    "partial_rotary_factor": 1.0,
    "rope_is_neox_style": True,
    "dual_chunk_attention_config": None,
    "bias": False,
}


_ADAPTED_EXPERTS = ("qwen3_moe",)


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
    if architecture.experts is not None and architecture.experts.shared:
        shared = architecture.experts.shared
        parts.append(("trainer.parallel.tensor", parallel.tensor, "rows of the shared expert", shared))
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


def check_routing_replay(folder: Path, architecture: Architecture, routing_replay: str) -> None:
    """Raise ConfigError if `trainer.routing_replay` replays the experts of a model that has none."""
    if routing_replay != "none" and architecture.experts is None:
        raise ConfigError(
            f"trainer.routing_replay = {routing_replay}, but the model of {folder / CONFIG} has no experts; "
            "none is allowed"
        )


def check_adapters(folder: Path, architecture: Architecture, lora: LoraConfig | None) -> None:
    """Raise ConfigError if PEFT would not read the adapters of `trainer.lora` in the experts of a mixture."""
    if lora is None or architecture.experts is None:
        return
    chosen = [name for name in lora.targets if name in MLP_PROJECTIONS]
    found = f"trainer.lora.targets has {', '.join(chosen)}, but "
    allowed = "q_proj, k_proj, v_proj and o_proj are allowed"
    if chosen and architecture.model_type not in _ADAPTED_EXPERTS:
        raise ConfigError(
            f"{found}PEFT reads no adapters of the experts of a {architecture.model_type} "
            f"({folder / CONFIG}); {allowed}"
        )
    if 0 < len(chosen) < len(MLP_PROJECTIONS):
        raise ConfigError(
            f"{found}PEFT reads adapters of experts ({folder / CONFIG}) for {', '.join(MLP_PROJECTIONS)} "
            f"together; {allowed} without them"
        )


def check_served_adapter(folder: Path, architecture: Architecture, lora: LoraConfig | None) -> None:
    """Raise ConfigError if `weights.send = adapter` would have engines serve adapters of experts."""
    if lora is not None and architecture.experts is not None and set(lora.targets) & set(MLP_PROJECTIONS):
        raise ConfigError(
            "weights.send = adapter, and trainer.lora.targets has projections of experts "
            f"({folder / CONFIG}): their adapters are not tested in SGLang; merged is allowed, or q_proj, "
            "k_proj, v_proj and o_proj"
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
    for name in (
        *("model_type", "dimensions", "hidden", "intermediate", "heads", "tied", "experts"),
        "attention_bias",
    ):
        expected, found = getattr(ours, name), getattr(theirs, name)
        if expected != found:
            raise ModelError(f"{folder}: not the model of {model}: {name} is {found}, not {expected}")
