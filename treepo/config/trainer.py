"""Configuration of the Megatron-Core trainer: parallel layout, optimizer, micro-batches."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from treepo.config.base import Section


class ParallelConfig(Section):
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    sequence: bool = True
    """Tensor-parallel ranks also divide the tokens outside attention and MLP, which saves memory."""
    context: int = Field(default=1, ge=1)
    """Ranks that divide the tokens of each pack among them, so that a pack may be longer than one device
    holds. `trainer.max_tokens_per_pack` counts the whole pack: a device computes 1/`context` of it."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks on each stage. Above 1 the stages interleave: less idle time, more messages."""
    expert: int = Field(default=1, ge=1)
    """Ranks that divide a model's experts among them. They are drawn from the tensor, context and data
    ranks."""
    data: int = Field(default=1, ge=1)
    """Data-parallel replicas, which divide a step's prompts among them."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether tensor-parallel ranks divide the tokens among them."""
        return self.sequence and self.tensor > 1

    @property
    def sequence_multiple(self) -> int:
        """Of which a slice's number of tokens is a multiple, so that its ranks hold equally many."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def ranks(self) -> int:
        """All processes, one on each device."""
        return self.stage_ranks * self.pipeline

    @property
    def stage_ranks(self) -> int:
        """The processes of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def replica_ranks(self) -> int:
        """The processes of one pipeline stage that compute the same packs together."""
        return self.tensor * self.context

    def replica(self, rank: int) -> int:
        """The data-parallel replica of a rank: ranks count tensor fastest, then context, data, pipeline."""
        return rank // self.replica_ranks % self.data

    @model_validator(mode="after")
    def _experts_have_ranks(self) -> Self:
        if self.stage_ranks % self.expert:
            raise ValueError(
                f"tensor x context x data = {self.tensor} x {self.context} x {self.data} = "
                f"{self.stage_ranks} ranks cannot be divided into groups of expert = {self.expert}"
            )
        return self

    @model_validator(mode="after")
    def _chunks_need_stages(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline = {self.virtual_pipeline} needs several pipeline stages, but pipeline = 1"
            )
        return self


class OptimizerConfig(Section):
    learning_rate: float = Field(default=1e-6, gt=0)
    """Adam's learning rate after the warm-up: its largest."""
    warmup_steps: int = Field(default=10, ge=0)
    """Optimizer steps of the warm-up: step k, counted from 1, uses k / warmup_steps of the learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: it stays, or falls to `min_learning_rate` along a line
    or half a cosine."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, those of the warm-up included, after which `linear` and `cosine` have reached
    `min_learning_rate`; usually `steps` x `learning.mini_batches`."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """The learning rate to which `linear` and `cosine` fall, and at which they stay."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Adam's decay rates of the first and second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices. Norms and biases have none."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    @model_validator(mode="after")
    def _a_schedule_has_an_end(self) -> Self:
        if self.schedule == "constant":
            for option, default in (("decay_steps", None), ("min_learning_rate", 0.0)):
                if (value := getattr(self, option)) != default:
                    raise ValueError(
                        f"{option} = {value} with schedule = constant: only linear and cosine read it; leave "
                        f"it at {'null' if default is None else default}"
                    )
        elif self.decay_steps is None or self.decay_steps <= self.warmup_steps:
            found = "null" if self.decay_steps is None else self.decay_steps
            raise ValueError(
                f"schedule = {self.schedule} with decay_steps = {found} and warmup_steps = "
                f"{self.warmup_steps}: it needs decay_steps above warmup_steps; usually steps x "
                "learning.mini_batches"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} is above learning_rate = {self.learning_rate}"
            )
        return self


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A linear layer of a decoder, by its name in transformers."""
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class LoraConfig(Section):
    rank: int = Field(default=32, ge=1)
    """Rows of A and columns of B: the rank of what training can add to a projection."""
    alpha: float = Field(default=64.0, gt=0)
    """A projection's output gets alpha / rank times B A x."""
    targets: list[Projection] = Field(default=list(get_args(Projection)), min_length=1)
    """The projections with adapters, by their names in transformers and PEFT. In a mixture `gate_proj`,
    `up_proj` and `down_proj` are those of every expert, all three or none; Qwen2-MoE's experts have none."""
    dropout: float = 0.0
    """Must be 0: a token's log-prob would differ from pass to pass, so PPO's ratio would not be 1 before the
    first update."""

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: list[Projection]) -> list[Projection]:
        if twice := sorted({name for name in targets if targets.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} twice; each projection has one adapter")
        return targets

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"{dropout:g} is not allowed, only 0: a token's log-prob would differ from pass to pass, so "
                "PPO's ratio would not be 1 before the first update"
            )
        return dropout


class TrainerConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    """The layout of tensor x context x pipeline x data ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam and its learning rate schedule."""
    lora: LoraConfig | None = None
    """Train adapters (LoRA) beside frozen weights; null trains all weights. `{}` takes the defaults. Layers
    are then Megatron-Core's own."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """Optimizer steps in a row whose loss or gradient is not finite, after which the run ends. Such a step is
    skipped: weights, optimizer state and warm-up stay as they were."""
    max_tokens_per_pack: int = Field(default=16384, ge=1)
    """Most tokens in one micro-batch, on all ranks of `parallel.context` together."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, those inside attention (`selective`), or all
    of a layer but its input (`full`)."""
    routing_replay: Literal["none", "trainer", "rollout"] = "none"
    """Which experts a mixture's training passes use for a token: the trainer's own choice of each pass
    (`none`), its choice before the step's updates (`trainer`), or the engine's while it sampled (`rollout`,
    as R3). Replayed experts are weighted by the current router, which learns as without replay."""
    transformer_impl: Literal["auto", "te", "local"] = "auto"
    """Layers of Transformer Engine (`te`) or of Megatron-Core alone (`local`). `auto` uses Transformer
    Engine's on CUDA if it is installed."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the trainer copies to the host's memory while engines on the same devices sample: nothing, the
    optimizer state, or the weights too (`all`). This leaves more memory to the KV cache and costs two
    transfers a step. Gradients are freed in any case. Without shared devices it has no effect."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of the trainer in one run, after a rank died or hung: all ranks start again and continue from
    the last checkpoint, while the engines stay up. A rank that ran out of memory is not started again."""
    silence_seconds: float = Field(default=600, gt=0)
    """The trainer hangs if a rank has not answered, or no rank has finished anything, for this long during a
    call. Starting, and writing or reading a folder, may take 30 minutes without a sign of progress."""

    @model_validator(mode="after")
    def _adapters_need_local_layers(self) -> Self:
        if self.lora is not None and self.transformer_impl == "te":
            raise ValueError(
                "transformer_impl = te with lora: adapters are built beside Megatron-Core's own layers; auto "
                "and local are allowed"
            )
        return self
