"""The Megatron-Core trainer: parallel layout, optimizer, micro-batches."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from treepo.config.base import Section


class ParallelConfig(Section):
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    sequence: bool = True
    """Tensor-parallel ranks also divide the tokens among them, outside attention and MLP: less memory."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks on each stage; above 1 the stages interleave: fewer idle moments, more messages."""
    expert: int = Field(default=1, ge=1)
    """Ranks among which a model's experts are divided; drawn from the tensor and data ranks, it adds none."""
    data: int = Field(default=1, ge=1)
    """Data-parallel replicas; a step's prompts are divided among them."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether tokens are divided among tensor-parallel ranks."""
        return self.sequence and self.tensor > 1

    @property
    def ranks(self) -> int:
        """Processes in all, one a device."""
        return self.tensor * self.pipeline * self.data

    @model_validator(mode="after")
    def _experts_have_ranks(self) -> Self:
        if self.tensor * self.data % self.expert:
            raise ValueError(
                f"tensor x data = {self.tensor} x {self.data} = {self.tensor * self.data} ranks cannot be "
                f"divided into groups of expert = {self.expert}"
            )
        return self

    @model_validator(mode="after")
    def _chunks_need_stages(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline = {self.virtual_pipeline} divides the layers of each of several pipeline "
                "stages, but pipeline = 1"
            )
        return self


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


class TrainerConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    """The layout; tensor x pipeline x data ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam."""
    max_tokens_per_pack: int = Field(default=16384, ge=1)
    """Most tokens in one micro-batch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, those in attention (`selective`), or all of
    a layer but its input (`full`)."""
    transformer_impl: Literal["auto", "te", "local"] = "auto"
    """Layers of Transformer Engine (`te`) or of Megatron-Core alone (`local`); `auto`: of the former on CUDA
    where it is installed."""
