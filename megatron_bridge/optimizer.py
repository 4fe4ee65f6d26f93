"""Megatron-Core's optimizer: gradients accumulated and weights kept in float32, nothing stepped on a NaN."""

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_bridge.optimizer_state import start_moments
from treepo.config.trainer import TrainerConfig


def trainable(
    chunks: Sequence[GPTModel], config: TrainerConfig, dtype: torch.dtype
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wrap the model's chunks for gradient accumulation in float32, and make their optimizer: master weights
    in float32, sharded over the replicas. It is the same kind for one replica, so that checkpoints are too.
    All memory that it will keep is taken here.
    """
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            chunk,
        )
        for chunk in chunks
    ]
    optimizer = config.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    made = get_megatron_optimizer(settings, list(wrapped))
    start_moments(made)
    return wrapped, made


def step(optimizer: MegatronOptimizer) -> float:
    """Clip the gradients and step; returns their norm before clipping.

    Raises FloatingPointError, on all ranks, where the norm is not finite, and leaves weights and moments as
    they are: Megatron-Core itself would step (it looks for NaN only where losses are scaled). Its `step`
    takes the norm once more, a small share of an optimizer step.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    optimizer.step()
    return norm
