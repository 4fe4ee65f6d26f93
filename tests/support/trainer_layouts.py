"""The models and layouts of the tests of Megatron-Core ranks, and which model runs at which layout."""

from typing import Any

from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from treepo.config.trainer import ParallelConfig

VOCABULARY = 127  # odd: padded at every tensor-parallel size
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.15,  # far from a flat distribution
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEEP: dict[str, Any] = SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=20, tie_word_embeddings=False),
    "llama": LlamaConfig(**DEEP, head_dim=10, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "qwen3_moe": Qwen3MoeConfig(
        **{**DEEP, "head_dim": 20},  # its constructor takes it, unnamed
        tie_word_embeddings=False,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "qwen3_moe, unscaled": Qwen3MoeConfig(
        **{**SIZES, "head_dim": 20},
        tie_word_embeddings=False,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        decoder_sparse_step=2,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **DEEP,
        tie_word_embeddings=False,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[1],
    ),
    "mistral": MistralConfig(**SIZES, head_dim=20, sliding_window=None, tie_word_embeddings=False),
    "qwen3, biased": Qwen3Config(**SIZES, head_dim=20, attention_bias=True, tie_word_embeddings=False),
    "qwen3_moe, biased": Qwen3MoeConfig(
        **{**SIZES, "head_dim": 20},
        attention_bias=True,
        tie_word_embeddings=False,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "llama, biased": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
}
LAYOUTS = {
    "tensor 2": ParallelConfig(tensor=2),
    "tensor 2, sequence whole": ParallelConfig(tensor=2, sequence=False),
    "tensor 2, expert 2": ParallelConfig(tensor=2, expert=2),
    "pipeline 2": ParallelConfig(pipeline=2),
    "pipeline 2, interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "data 2": ParallelConfig(data=2),
    "data 2, expert 2": ParallelConfig(data=2, expert=2),
    "tensor 4": ParallelConfig(tensor=4),
    "tensor 2, pipeline 2": ParallelConfig(tensor=2, pipeline=2),
    "tensor 2, pipeline 2, interleaved": ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2),
    "tensor 2, data 2": ParallelConfig(tensor=2, data=2),
    "pipeline 2, data 2, expert 2": ParallelConfig(pipeline=2, data=2, expert=2),
    "context 2": ParallelConfig(context=2),
    "context 2, expert 2": ParallelConfig(context=2, expert=2),
    "context 4": ParallelConfig(context=4),
    "context 2, tensor 2": ParallelConfig(context=2, tensor=2),
    "context 2, tensor 2, expert 4": ParallelConfig(context=2, tensor=2, expert=4),
    "context 2, tensor 2, sequence whole": ParallelConfig(context=2, tensor=2, sequence=False),
    "context 2, pipeline 2": ParallelConfig(context=2, pipeline=2),
    "context 2, pipeline 2, interleaved": ParallelConfig(context=2, pipeline=2, virtual_pipeline=2),
    "context 2, data 2": ParallelConfig(context=2, data=2),
    "context 2, data 2, expert 2": ParallelConfig(context=2, data=2, expert=2),
}
# Every layout with models that exercise it, every model at several layouts.
MODELS = {
    "tensor 2": ["qwen2", "qwen2-tied", "qwen3", "qwen3_moe", "qwen2_moe", "mistral", "qwen3, biased"],
    "tensor 2, sequence whole": ["qwen3", "llama", "llama, biased"],
    "tensor 2, expert 2": ["qwen3_moe", "qwen2_moe", "qwen3_moe, biased"],
    "pipeline 2": ["qwen2", "qwen2-tied"],
    "pipeline 2, interleaved": ["llama", "qwen3_moe", "qwen2_moe"],
    "data 2": ["qwen2", "qwen3"],
    "data 2, expert 2": ["qwen3_moe", "qwen3_moe, unscaled", "qwen2_moe"],
    "tensor 4": ["llama", "qwen2_moe"],
    "tensor 2, pipeline 2": ["qwen2", "qwen2-tied", "qwen3", "mistral", "llama, biased"],
    "tensor 2, pipeline 2, interleaved": ["llama", "qwen2_moe"],
    "tensor 2, data 2": ["qwen3", "qwen3, biased"],
    "pipeline 2, data 2, expert 2": ["qwen3_moe", "qwen2_moe"],
    "context 2": ["qwen2", "qwen2-tied", "qwen3", "llama", "qwen2_moe"],
    "context 2, expert 2": ["qwen3_moe", "qwen2_moe"],
    "context 4": ["qwen2", "qwen3_moe"],
    "context 2, tensor 2": ["qwen2", "qwen3", "qwen2_moe"],
    "context 2, tensor 2, expert 4": ["qwen3_moe"],
    "context 2, tensor 2, sequence whole": ["llama"],
    "context 2, pipeline 2": ["qwen2", "qwen2-tied"],
    "context 2, pipeline 2, interleaved": ["llama", "qwen3_moe"],
    "context 2, data 2": ["qwen2", "qwen3"],
    "context 2, data 2, expert 2": ["qwen3_moe", "qwen2_moe"],
}
PAIRS = [(layout, model) for layout, models in MODELS.items() for model in models]
RECOMPUTE = {
    "tensor 2, expert 2": "selective",
    "pipeline 2, data 2, expert 2": "full",
    "context 2, expert 2": "selective",
    "context 2, pipeline 2": "selective",
    "context 2, data 2, expert 2": "full",
}
VARIANTS = [
    "data 2",
    "tensor 2, pipeline 2",
    "context 2",
]  # layouts at which the first model is trained in other ways too
# Layouts at which a whole batch is trained: packs are filled up, padded, and shared by experts.
BATCHES = [
    "data 2",
    "data 2, expert 2",
    "pipeline 2, interleaved",
    "tensor 2, pipeline 2",
    "context 2, data 2",
    "context 2, pipeline 2, interleaved",
]
