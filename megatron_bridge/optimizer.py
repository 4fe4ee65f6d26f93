"""Builds and steps Megatron-Core's optimizer: float32 gradients and master weights, no step on a NaN."""

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_bridge.optimizer_state import allocate_optimizer_state
from treepo.config.trainer import TrainerConfig


def trainable(
    chunks: Sequence[GPTModel], config: TrainerConfig, dtype: torch.dtype
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wrap the model's chunks to accumulate gradients in float32, and build their optimizer.

    Master weights are float32 and sharded over the replicas. A single replica gets the same distributed
    optimizer, so that its checkpoints are the same too. All memory that the optimizer keeps is allocated
    here.
    """
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            chunk,
        )
        for chunk in chunks
    ]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.betas[0],
        adam_beta2=config.optimizer.betas[1],
        adam_eps=config.optimizer.epsilon,
        clip_grad=config.optimizer.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, list(wrapped))
    allocate_optimizer_state(optimizer)
    return wrapped, optimizer


def step(optimizer: MegatronOptimizer) -> float:
    """Clip the gradients and take a step; return their norm before clipping.

    Raises FloatingPointError on all ranks if the norm is not finite, and leaves weights and optimizer state
    as they were. Megatron-Core itself would step: it looks for NaN only if losses are scaled. Its `step`
    computes the norm again, which costs a small share of an optimizer step.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}: no rank took the step")
    optimizer.step()
    return norm
