"""Megatron-Core's model of an architecture. GPTModel is built in this file only."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import Parameter

from megatron_bridge.architecture import Architecture
from megatron_bridge.layers import final_norm, layer_spec, use_transformer_engine
from megatron_bridge.weights import global_name, padded_vocabulary
from treepo.config.trainer import TrainerConfig


def build_model(architecture: Architecture, dtype: torch.dtype, trainer: TrainerConfig) -> list[GPTModel]:
    """The part of the model that is this rank's, uninitialised, in as many chunks as its pipeline stage has.
    Parallel state must be initialised.
    """
    config = _transformer_config(
        architecture, dtype, trainer, use_transformer_engine(trainer.transformer_impl)
    )
    return [
        _build_chunk(architecture, config, trainer, chunk)
        for chunk in range(trainer.parallel.virtual_pipeline)
    ]


def outline(architecture: Architecture, dtype: torch.dtype) -> GPTModel:
    """The whole model for one rank, names and shapes without memory. Parallel state must be initialised."""
    (model,) = outlines(architecture, dtype, TrainerConfig())
    return model


def outlines(architecture: Architecture, dtype: torch.dtype, trainer: TrainerConfig) -> list[GPTModel]:
    """What `build_model` makes of Megatron-Core's own layers: names and shapes without memory, anywhere.
    Transformer Engine's have the same parameters. Parallel state must be initialised.
    """
    config = _transformer_config(architecture, dtype, trainer, transformer_engine=False)
    config.use_cpu_initialization = True  # else it would name a device
    with torch.device("meta"):
        return [
            _build_chunk(architecture, config, trainer, chunk).to(dtype=dtype)
            for chunk in range(trainer.parallel.virtual_pipeline)
        ]


def _build_chunk(
    architecture: Architecture, config: TransformerConfig, trainer: TrainerConfig, chunk: int
) -> GPTModel:
    virtual = chunk if trainer.parallel.virtual_pipeline > 1 else None
    engine = config.transformer_impl == "transformer_engine"
    first, count = get_transformer_layer_offset(config, virtual), get_num_layers_to_build(config, virtual)
    block = TransformerBlockSubmodules(
        layer_specs=[layer_spec(architecture, first + layer, engine) for layer in range(count)],
        layer_norm=final_norm(engine),
    )
    return GPTModel(
        config,
        block,  # type: ignore[arg-type]  # a block's parts serve as well as a layer's
        vocab_size=padded_vocabulary(architecture.dimensions.vocabulary, trainer.parallel.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="none",  # the core attention rotates by the pack's positions
        vp_stage=virtual,
    )


def _transformer_config(
    architecture: Architecture, dtype: torch.dtype, trainer: TrainerConfig, transformer_engine: bool
) -> TransformerConfig:
    chunks = trainer.parallel.virtual_pipeline
    recompute = {
        "none": {},
        # Of the modules on Megatron-Core's list the one that does without Transformer Engine.
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[trainer.recompute]
    return TransformerConfig(
        transformer_impl="transformer_engine" if transformer_engine else "local",
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
        tensor_model_parallel_size=trainer.parallel.tensor,
        sequence_parallel=trainer.parallel.sequence_parallel,
        pipeline_model_parallel_size=trainer.parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # Interleaved stages send to both neighbours at once. Of two stages these are the same rank: only this
        # way of sending tells them apart.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
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
        **_experts_config(architecture, trainer, transformer_engine),
    )


def _experts_config(
    architecture: Architecture, trainer: TrainerConfig, transformer_engine: bool
) -> dict[str, Any]:
    """No loss balances the experts' load: the gradient is the policy's alone."""
    dimensions, experts = architecture.dimensions, architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": dimensions.experts,
        "moe_layer_freq": [int(layer in dimensions.sparse_layers) for layer in range(dimensions.layers)],
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_grouped_gemm": transformer_engine,
        "moe_router_topk": experts.per_token,
        # The softmax of the chosen logits is that of all logits, scaled to sum to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",  # the choice of experts should not hang on rounding
        "expert_model_parallel_size": trainer.parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def named_parameters(chunks: Sequence[GPTModel]) -> dict[str, Parameter]:
    """The parameters of this rank, under names that count layers and experts over the whole model."""
    named = {}
    for chunk in chunks:
        layers = [int(layer.layer_number) - 1 for layer in chunk.decoder.layers]  # type: ignore[arg-type]  # a module's attribute
        first_expert = 0
        if chunk.config.num_moe_experts:
            local = chunk.config.num_moe_experts // chunk.config.expert_model_parallel_size
            first_expert = local * parallel_state.get_expert_model_parallel_rank()
        for name, parameter in chunk.named_parameters():
            named[global_name(name, layers, first_expert)] = parameter
    return named
