"""What a transformer layer is made of: modules of Megatron-Core or Transformer Engine, our attention in them.

Transformer Engine's layers are built as Megatron-Core's own training script builds them; they have not been
tried here, where there is no such build.
"""

import logging

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

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import AttentionPlan, attend
from treepo.errors import ConfigError

_log = logging.getLogger(__name__)


class TreeAttention(MegatronModule):
    """Megatron-Core's `core_attention`; the micro-batch's plan reaches it as `attention_bias`."""

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
    """Megatron-Core's own wrapper of torch's norm refuses sequence parallelism. There each tensor-parallel
    rank norms its part of the tokens, and `sequence_parallel` has the ranks' weight gradients summed.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-Core's mark


def use_transformer_engine(wanted: str) -> bool:
    """Whether layers are Transformer Engine's; wanted: `trainer.transformer_impl`.

    Raises ConfigError where they are asked for and cannot be had.
    """
    usable = HAVE_TE and torch.cuda.is_available()
    if wanted == "te" and not usable:
        lacking = "Transformer Engine cannot be imported" if not HAVE_TE else "there is no CUDA device"
        raise ConfigError(f"trainer.transformer_impl = te, but {lacking}; auto and local do without")
    chosen = usable and wanted != "local"
    _log.info("layers are %s (trainer.transformer_impl = %s)", _MAKERS[chosen], wanted)
    return chosen


_MAKERS = {True: "Transformer Engine's", False: "Megatron-Core's own"}


def final_norm(transformer_engine: bool) -> type:
    """The norm after the last layer."""
    return TENorm if transformer_engine else RMSNorm


def layer_spec(architecture: Architecture, layer: int, transformer_engine: bool) -> ModuleSpec:
    """What `layer`, counted over the whole model from 0, is made of."""
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
    if transformer_engine:
        return spec
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm  # type: ignore[union-attr]  # likewise
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
