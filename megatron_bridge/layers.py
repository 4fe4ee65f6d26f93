"""Layer specs: modules of Megatron-Core or Transformer Engine, with tree attention in place of their own.

Transformer Engine's layers are built as Megatron-Core's own training script builds them. They have not been
run: no build of Transformer Engine was available.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import AttentionPlan, attend
from treepo.errors import ConfigError

_log = logging.getLogger(__name__)


class TreeAttention(MegatronModule):
    """Tree attention as Megatron-Core's `core_attention`; `attention_bias` is the micro-batch's plan."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        attention_bias: AttentionPlan,
        **_: object,
    ) -> Tensor:
        """query: [T, 1, heads, D]; key and value: [T, 1, groups, D]. Returns [T, 1, heads * D]."""
        del attention_mask
        return attend(query[:, 0], key[:, 0], value[:, 0], attention_bias).flatten(1)[:, None]


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm with support for sequence parallelism, which Megatron-Core's own wrapper refuses.

    Each tensor-parallel rank norms its part of the tokens. The `sequence_parallel` mark makes Megatron-Core
    sum the ranks' weight gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-Core's mark


def use_transformer_engine(wanted: str) -> bool:
    """Whether to build Transformer Engine's layers; wanted: `trainer.transformer_impl`.

    Raises ConfigError if they are configured but cannot be used.
    """
    usable = HAVE_TE and torch.cuda.is_available()
    if wanted == "te" and not usable:
        lacking = "Transformer Engine cannot be imported" if not HAVE_TE else "there is no CUDA device"
        raise ConfigError(f"trainer.transformer_impl = te, but {lacking}; use auto or local")
    chosen = usable and wanted != "local"
    _log.info("layers are %s (trainer.transformer_impl = %s)", _MAKERS[chosen], wanted)
    return chosen


_MAKERS = {True: "Transformer Engine's", False: "Megatron-Core's own"}


def final_norm(transformer_engine: bool) -> type:
    """The norm after the last layer."""
    return TENorm if transformer_engine else RMSNorm


def layer_spec(architecture: Architecture, layer: int, transformer_engine: bool) -> ModuleSpec:
    """The spec of one layer. layer: its number in the whole model, from 0."""
    dimensions, qk_norm = architecture.dimensions, architecture.family.qk_norm
    experts = dimensions.experts if layer in dimensions.sparse_layers else None
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            experts, moe_grouped_gemm=True, qk_layernorm=qk_norm
        )
    else:
        spec = get_gpt_layer_local_spec(experts, qk_layernorm=qk_norm, normalization="RMSNorm")
    parts = spec.submodules
    attention = parts.self_attention.submodules  # type: ignore[union-attr]  # a spec's parts are typed as object
    attention.core_attention = TreeAttention
    if architecture.family.output_bias:
        attention.linear_proj = _with_bias(attention.linear_proj)
    if transformer_engine:
        return spec
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm  # type: ignore[union-attr]  # likewise
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _with_bias(projection: Callable[..., Module]) -> Callable[..., Module]:
    """The output projection with a bias. Megatron-Core's own option adds biases to the MLP too."""

    def build(*sizes: int, **options: Any) -> Module:
        return projection(*sizes, **(options | {"bias": True}))

    return build
