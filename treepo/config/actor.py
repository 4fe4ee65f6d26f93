"""The Megatron-Core actor: parallel layout, optimizer, micro-batches."""

from typing import Annotated, Literal

from pydantic import Field

from treepo.config.base import Section


class ParallelConfig(Section):
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""
    data: int = Field(default=1, ge=1)
    """Data-parallel replicas; a step's prompts are divided among them."""

    @property
    def ranks(self) -> int:
        """Processes in all, one a device."""
        return self.tensor * self.pipeline * self.data


class OptimizerConfig(Section):
    learning_rate: float = Field(default=1e-6, gt=0)
    """Adam's learning rate after the warm-up."""
    warmup_steps: int = Field(default=10, ge=0)
    """Step k of so many first optimizer steps, counted from 1, uses k / warmup_steps of the learning rate."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Adam's moment decay rates."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class ActorConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    """The layout; tensor x pipeline x data ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam."""
    max_tokens_per_pack: int = Field(default=16384, ge=1)
    """Most tokens in one micro-batch."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation: `full` keeps only each layer's input."""
