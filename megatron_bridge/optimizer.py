"""Builds and steps Megatron-Core's optimizer: float32 gradients and master weights, no step on a NaN."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_bridge.optimizer_state import allocate_optimizer_state, optimizer_parts
from treepo.config.trainer import TrainerConfig


def trainable(
    chunks: Sequence[GPTModel], config: TrainerConfig, dtype: torch.dtype
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wrap the model's chunks to accumulate gradients in float32, and build their optimizer.

    Master weights are float32 and sharded over the replicas. A single replica gets the same distributed
    optimizer, so that its checkpoints are the same too. All memory that the optimizer keeps is allocated
    here.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlaps(chunks, config)
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    if ddp.overlap_grad_reduce:
        for chunk in chunks:
            chunk.config.no_sync_func = partial(_without_sums, wrapped)
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
    for group in optimizer.param_groups:
        group["fused"] = True  # torch's Adam in one kernel; Transformer Engine's always is
    allocate_optimizer_state(optimizer)
    return wrapped, optimizer


class LearningRate:
    """Megatron-Core's learning rate schedule, which depends on the number of optimizer steps alone.

    It gets no parameter groups: they have rates of their own, which a checkpoint brings back from its run.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: TrainerConfig) -> None:
        self._optimizer, self._weight_decay = optimizer, config.optimizer.weight_decay
        rate, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
        self._schedule = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]),  # type: ignore[reportArgumentType]  # all that it reads
            init_lr=0.0,
            max_lr=rate,
            min_lr=config.optimizer.min_learning_rate,
            lr_warmup_steps=warmup,
            lr_decay_steps=config.optimizer.decay_steps or warmup + 1,  # `constant` does not read it
            lr_decay_style=config.optimizer.schedule,
            start_wd=self._weight_decay,
            end_wd=self._weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set(self, taken: int) -> float:
        """Set and return the learning rate of the optimizer step after `taken` others."""
        self._schedule.num_steps = taken + 1
        rate = self._schedule.get_lr({})
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        return rate


@contextmanager
def _without_sums(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Sum no gradients over replicas within it, which all micro-batches of a step but the last are."""
    with ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
        yield


def overlaps(chunks: Sequence[GPTModel], config: TrainerConfig) -> bool:
    """Whether replicas sum a bucket of gradients while the backward pass computes the next.

    Every parameter needs a gradient in every micro-batch, and an expert without a token has none. The weights
    are never gathered during the next forward pass: they are read outside of it too, for engines and
    checkpoints.
    """
    copies = config.parallel.data * config.parallel.context
    return copies > 1 and not any(chunk.config.num_moe_experts for chunk in chunks)


@torch.no_grad()
def step(optimizer: MegatronOptimizer, loss: Tensor) -> float:
    """Clip the gradients and take a step; return their norm before clipping. Collective.

    loss: a scalar, this rank's part of it, or 0. If a gradient or a loss of any rank is not finite, neither
    is the norm that all ranks return, and no rank steps: weights and optimizer state stay as they were.

    Megatron-Core itself would step: it looks for NaN only if losses are scaled. Without Transformer Engine
    its norm also waits for the device at every parameter. Here torch's Adam clips, and decides whether to
    step, on the device, so that the host waits once, when everything is launched.
    """
    norm, largest = gradient_norm(optimizer, loss), optimizer.config.clip_grad
    parts = optimizer_parts(optimizer)
    on_device = all(isinstance(part.optimizer, torch.optim.AdamW) for part in parts)
    if on_device:
        for part in parts:
            part.optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1.0)
            part.optimizer.found_inf = norm.isfinite().logical_not().float()
    else:  # Transformer Engine's Adam takes neither
        if not norm.isfinite():
            return norm.item()
        torch.nn.utils.clip_grads_with_norm_(optimizer.get_parameters(), largest, norm)
    optimizer.step_with_ready_grads()
    return norm.item()


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, loss: Tensor) -> Tensor:
    """Give the optimizer the gradient; return the norm of the whole model's, on the device. Collective.

    It is NaN if a rank's `loss` is not finite.
    """
    optimizer.prepare_grads()
    parts = optimizer_parts(optimizer)
    (group,) = {part.get_grad_stats_parallel_group() for part in parts}  # experts' gradients have the same
    gradients = [gradient for part in parts for gradient in part.get_grads_for_grad_norm()]
    nothing = (0.0 * loss).float().view(1)  # NaN if the loss is not finite; else a rank may own no gradient
    square = torch.nn.utils.get_total_norm([*gradients, nothing]).square()
    dist.all_reduce(square, group=group)
    return square.sqrt()
