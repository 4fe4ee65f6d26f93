"""Builds Megatron-Core's GPTModel from an architecture; no other module does."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import Parameter

from megatron_bridge.architecture import Architecture
from megatron_bridge.hf_weight_map import global_name
from megatron_bridge.layers import final_norm, layer_spec, use_transformer_engine
from megatron_bridge.tensor_surgery import padded_vocabulary
from treepo.config.trainer import TrainerConfig


def build_model(architecture: Architecture, dtype: torch.dtype, trainer: TrainerConfig) -> list[GPTModel]:
    """Build this rank's part of the model, uninitialised: one chunk, or several if stages interleave.

    The parallel groups must have been formed.
    """
    engine = use_transformer_engine("local" if trainer.lora is not None else trainer.transformer_impl)
    config = _transformer_config(architecture, dtype, trainer, engine)
    return [
        _build_chunk(architecture, config, trainer, chunk)
        for chunk in range(trainer.parallel.virtual_pipeline)
    ]


def build_outline(architecture: Architecture, dtype: torch.dtype, trainer: TrainerConfig) -> list[GPTModel]:
    """Build as `build_model` does, but names and shapes without memory, on any machine.

    Layers are Megatron-Core's own; Transformer Engine's have the same parameters. The parallel groups must
    have been formed.
    """
    config = _transformer_config(architecture, dtype, trainer, transformer_engine=False)
    config.use_cpu_initialization = True  # otherwise Megatron-Core names a device
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
        block,  # type: ignore[arg-type]  # it takes a block's parts as well as a layer's
        vocab_size=padded_vocabulary(architecture.dimensions.vocabulary, trainer.parallel.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="none",  # our attention rotates by the pack's positions
        vp_stage=virtual,
    )


def _transformer_config(
    architecture: Architecture, dtype: torch.dtype, trainer: TrainerConfig, transformer_engine: bool
) -> TransformerConfig:
    chunks = trainer.parallel.virtual_pipeline
    recompute = {
        "none": {},
        # The only module on Megatron-Core's list that does not need Transformer Engine.
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
        # Interleaved stages send to both neighbours at once. With two stages both neighbours are the same
        # rank, and only overlapped messages tell them apart.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Our loss is already divided: Megatron-Core takes no mean over micro-batches or replicas.
        calculate_per_token_loss=True,
        # Packs differ in length, for which Megatron-Core wants this dispatcher even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # SwiGLU as one kernel, which torch compiles: FlexAttention needs the compiler anyway.
        bias_activation_fusion=torch.cuda.is_available(),
        # Apex's kernel, which NVIDIA's images have, adds a weight's gradient to its float32 sum.
        gradient_accumulation_fusion=torch.cuda.is_available()
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        # These fusions need kernels of Transformer Engine or Apex.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **recompute,
        **_experts_config(architecture, trainer, transformer_engine),
    )


def _experts_config(
    architecture: Architecture, trainer: TrainerConfig, transformer_engine: bool
) -> dict[str, Any]:
    """Settings of the experts. There is no load-balancing loss: the gradient is the policy's alone."""
    dimensions, experts = architecture.dimensions, architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": dimensions.experts,
        "moe_layer_freq": [int(layer in dimensions.sparse_layers) for layer in range(dimensions.layers)],
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_shared_expert_intermediate_size": experts.shared or None,
        "moe_shared_expert_gate": experts.shared > 0,
        "moe_grouped_gemm": transformer_engine,
        "moe_router_topk": experts.per_token,
        # Softmax over the chosen logits equals softmax over all of them, scaled to sum to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",  # rounding should not choose the experts
        "moe_enable_routing_replay": trainer.routing_replay != "none",
        "expert_model_parallel_size": trainer.parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def named_parameters(chunks: Sequence[GPTModel]) -> dict[str, Parameter]:
    """The parameters of this rank's chunks by their names in the families' tables, which number layers and
    experts over the whole model.
    """
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


def is_expert(parameter: Parameter) -> bool:
    """Whether the parameter is an expert's: whole on its rank, its gradient reduced among the ranks that hold
    the same expert.
    """
    return not getattr(parameter, "allreduce", True)  # Megatron-Core's mark
