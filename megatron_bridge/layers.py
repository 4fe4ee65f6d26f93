"""What a transformer layer is made of: Megatron-Core's modules, with our attention and norm in them."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import AttentionPlan, attend


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


def layer_spec(architecture: Architecture, layer: int) -> ModuleSpec:
    """What `layer`, counted over the whole model from 0, is made of."""
    dimensions = architecture.dimensions
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        qk_layernorm=architecture.family.qk_norm,
        num_experts=dimensions.experts if layer in dimensions.sparse_layers else None,
    )
    parts = spec.submodules
    attention = parts.self_attention.submodules  # type: ignore[union-attr]  # a spec's parts are typed as object
    attention.core_attention = TreeAttention
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm  # type: ignore[union-attr]  # likewise
    if architecture.family.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
