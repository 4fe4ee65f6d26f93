"""Megatron-Core's model of an architecture. GPTModel is built in this file only."""

import logging

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import AttentionPlan, attend
from megatron_bridge.weights import padded_vocabulary
from treepo.config.actor import ActorConfig

# It announces its successor, HybridModel, each time it is built.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


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


def build_model(architecture: Architecture, dtype: torch.dtype, actor: ActorConfig) -> GPTModel:
    """The part of the model that is this rank's, uninitialised. Parallel state must be initialised."""
    family = architecture.family
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=family.qk_norm)
    spec.submodules.self_attention.submodules.core_attention = TreeAttention  # type: ignore[union-attr]  # a spec's parts are typed as object
    return GPTModel(
        _transformer_config(architecture, dtype, actor),
        spec,
        vocab_size=padded_vocabulary(architecture.dimensions.vocabulary, actor.parallel.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="none",  # the core attention rotates by the pack's positions
    )


def _transformer_config(
    architecture: Architecture, dtype: torch.dtype, actor: ActorConfig
) -> TransformerConfig:
    recompute = {
        "none": {},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[actor.recompute]
    return TransformerConfig(
        num_layers=architecture.dimensions.layers,
        hidden_size=architecture.hidden,
        ffn_hidden_size=architecture.intermediate,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.dimensions.groups,
        kv_channels=architecture.dimensions.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.family.qkv_bias,
        qk_layernorm=architecture.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=actor.parallel.tensor,
        pipeline_model_parallel_size=actor.parallel.pipeline,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # The loss is divided by us, once: no hidden mean over micro-batches or replicas.
        calculate_per_token_loss=True,
        # Packs differ in length; Megatron-Core ties that to this dispatcher even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Fusions need Transformer Engine's or Apex's kernels, or a compiler at run time.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **recompute,
    )


def named_parameters(model: GPTModel) -> dict[str, Parameter]:
    """The parameters of this rank, under names in which layers are counted over all pipeline stages."""
    number = {
        f"decoder.layers.{index}.": f"decoder.layers.{int(layer.layer_number) - 1}."  # type: ignore[arg-type]  # a module's attribute
        for index, layer in enumerate(model.decoder.layers)
    }
    named = {}
    for name, parameter in model.named_parameters():
        prefix = ".".join(name.split(".")[:3]) + "."
        named[name.replace(prefix, number.get(prefix, prefix), 1)] = parameter
    return named
