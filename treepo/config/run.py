"""The schema of the YAML file that configures a training run."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from treepo.config.base import PathField, Section, unknown_name
from treepo.config.checkpoint import CheckpointConfig
from treepo.config.data import ColumnsConfig, DataConfig
from treepo.config.engine import EngineConfig
from treepo.config.heldout import HELDOUT, HeldoutConfig, HeldoutOptions, HeldoutSetConfig
from treepo.config.learning import LearningConfig
from treepo.config.log_prob_check import LogProbCheckConfig
from treepo.config.loggers import LoggerName, MlflowConfig, WandbConfig
from treepo.config.loop import LoopConfig
from treepo.config.plan import PlanConfig
from treepo.config.reward import RewardConfig
from treepo.config.sampling import SamplingConfig
from treepo.config.trainer import LoraConfig, TrainerConfig
from treepo.config.truncation import check_reproducible, whole_distribution
from treepo.config.weights import WeightsConfig
from treepo.errors import ConfigError


class ModelConfig(Section):
    path: PathField
    """A Hugging Face folder: config.json, safetensors, tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the parameters in the trainer (with float32 master weights) and in the engines. `auto`:
    bfloat16 on GPUs and float32 on CPUs, whatever the folder's weights have; float32 runs on CPUs only."""

    def on(self, *, gpus: bool) -> "ModelConfig":
        """The same model with `auto` decided for the devices that it runs on. Raises ConfigError."""
        if self.dtype == "auto":
            return ModelConfig(path=self.path, dtype="bfloat16" if gpus else "float32")
        if gpus and self.dtype == "float32":
            raise ConfigError(
                "model.dtype = float32: SGLang has no float32 RMSNorm for GPUs; bfloat16 and auto, which is "
                "bfloat16 on GPUs, are allowed"
            )
        return self


class RunConfig(Section):
    out: PathField
    """The run folder: config, metrics, trees, checkpoints, log, summary."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: data order, sampling, tree policies. Any whole number from 0. On GPUs SGLang
    samples by seed only with `engine.sglang: {enable_deterministic_inference: true}`, which needs
    `engine.attention_backend`."""
    steps: int = Field(ge=1)
    """Training steps: each samples `data.prompts_per_step` trees, or as many as
    `data.decoded_tokens_per_step` allows, and learns from them."""
    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Prompts: files, columns, how many a step."""
    reward: RewardConfig = RewardConfig()
    """How answers are graded and rewarded."""
    sampling: Annotated[SamplingConfig, AfterValidator(whole_distribution)] = SamplingConfig()
    """How trees are sampled."""
    loop: LoopConfig = LoopConfig()
    """Whether sampling waits for training."""
    learning: LearningConfig = LearningConfig()
    """Advantages and loss."""
    trainer: TrainerConfig = TrainerConfig()
    """The Megatron-Core trainer."""
    placement: Literal["colocated", "split"] = "colocated"
    """`colocated`: the engines run on the trainer's GPUs and take turns with it; `split`: on GPUs of their
    own. Without GPUs there is no difference."""
    engine: EngineConfig = EngineConfig()
    """The SGLang engines."""
    weights: WeightsConfig = WeightsConfig()
    """How the trainer's weights reach the engines."""
    evaluation: HeldoutConfig = HeldoutConfig()
    """Accuracy on held-out sets before, during and after training."""
    log_prob_check: LogProbCheckConfig = LogProbCheckConfig()
    """The check, before the first step, that trainer and engines agree."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Training checkpoints, from which an interrupted run continues."""
    save_routes: bool = False
    """Whether trees.jsonl has the routes of `trainer.routing_replay: rollout` too: the experts of every token
    in base64, about 500 bytes a token for a model of 48 layers with 8 experts each."""
    disk_seconds: float = Field(default=600.0, ge=0)
    """How long the run waits for its folder when it cannot be written (full, read-only, not there). What it
    has to write stays in memory; after that time the run ends and can be resumed."""
    logging: list[LoggerName] = Field(default=["tensorboard", "jsonl"])
    """Where each step's numbers go. `jsonl` is metrics.jsonl, which a run always writes: --resume reads it.
    `wandb` and `mlflow` also get the configuration, tables of sampled answers and the summary; each needs its
    package, `treepo[wandb]` or `treepo[mlflow]`."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases, if `logging` names it."""
    mlflow: MlflowConfig = MlflowConfig()
    """MLflow, if `logging` names it."""
    plan: PlanConfig = PlanConfig()
    """Assumptions of `treepo plan`; training does not read them."""

    @property
    def paths_at_once(self) -> int | None:
        """The most paths that one engine samples at once; None if a budget of tokens decides on the trees."""
        trees, most = math.ceil(self.max_untrained / self.engine.count), self.sampling.max_live_trees
        if self.data.decoded_tokens_per_step is not None:
            return None if most is None else most * self.sampling.most_leaves
        return min(trees, most or trees) * self.sampling.most_leaves

    @property
    def served_lora(self) -> LoraConfig | None:
        """Of the adapter that engines serve; None if they serve weights alone."""
        return self.trainer.lora if self.weights.send == "adapter" else None

    @property
    def samples_routes(self) -> bool:
        """Whether the engines return the routes of training trees."""
        return self.trainer.routing_replay == "rollout"

    @property
    def heldout_sets(self) -> dict[str, HeldoutSetConfig]:
        """The held-out sets by name, `data.heldout` first."""
        if self.data.heldout is None:
            return self.evaluation.sets
        options = {key: getattr(self.evaluation, key) for key in HeldoutOptions.model_fields}
        one = HeldoutSetConfig(path=self.data.heldout, columns=self.data.heldout_columns, **options)
        return {HELDOUT: one} | self.evaluation.sets

    @property
    def best_set(self) -> str | None:
        """The set by whose accuracy `evaluation.best` keeps a checkpoint; None if it keeps none."""
        if self.evaluation.best is None:
            return None
        return self.evaluation.best.rpartition("/")[0] or next(iter(self.heldout_sets))

    @property
    def max_untrained(self) -> int:
        """The most trees that have been started and not been trained, at any time; in the first step, if
        `data.decoded_tokens_per_step` decides on the others.
        """
        prompts, loop = self.data.prompts_per_step, self.loop
        if loop.mode == "sync":
            return math.ceil(round(prompts * self.sampling.oversample, 6))
        return prompts * (loop.max_staleness + 1)

    @model_validator(mode="after")
    def _loop_fits(self) -> Self:
        oversample, loop = self.sampling.oversample, self.loop
        if loop.mode == "async" and self.placement == "colocated":
            raise ValueError(
                "loop.mode = async with placement = colocated: engines and trainer cannot use the same "
                "devices at the same time; split is allowed, or loop.mode = sync with sampling.oversample"
            )
        if loop.mode == "async" and oversample != 1:
            raise ValueError(
                f"loop.mode = async with sampling.oversample = {oversample:g}: sampling never stops, and "
                "loop.max_staleness says how far it runs ahead; 1 is allowed"
            )
        if oversample > loop.max_staleness + 1:
            raise ValueError(
                f"sampling.oversample = {oversample:g} is more than loop.max_staleness + 1 = "
                f"{loop.max_staleness + 1}: the last of its trees would be too stale to train"
            )
        return self

    @model_validator(mode="after")
    def _steps_of_a_budget_follow_each_other(self) -> Self:
        tokens, oversample, mode = self.data.decoded_tokens_per_step, self.sampling.oversample, self.loop.mode
        if tokens is not None and (mode != "sync" or oversample != 1):
            raise ValueError(
                f"data.decoded_tokens_per_step = {tokens} with loop.mode = {mode} and sampling.oversample = "
                f"{oversample:g}: trees of later steps would begin before their number is known; sync and 1 "
                "are allowed, or data.decoded_tokens_per_step = null"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _columns_of_sets(cls, value: Any) -> Any:
        """A set without columns has those of `data.heldout`."""
        match value:
            case {"data": dict(data), "evaluation": {"sets": dict(sets)} as evaluation}:
                columns = data.get("heldout_columns", data.get("columns"))
            case _:
                return value
        if columns is None:
            return value
        try:
            ColumnsConfig.model_validate(columns)
        except ValidationError:
            return value  # a mistake in them is reported once
        filled = {
            name: {"columns": columns} | one if isinstance(one, dict) else one for name, one in sets.items()
        }
        return value | {"evaluation": evaluation | {"sets": filled}}

    @model_validator(mode="after")
    def _heldout_is_there(self) -> Self:
        evaluation, sets = self.evaluation, self.heldout_sets
        if evaluation.every is not None and not sets:
            raise ValueError(
                f"evaluation.every = {evaluation.every} with data.heldout = null and no evaluation.sets: "
                "there is nothing to evaluate on; null is allowed"
            )
        if evaluation.best is None:
            return self
        if self.checkpoint.every is None:
            raise ValueError(
                f"evaluation.best = {evaluation.best} with checkpoint.every = null: no checkpoint is "
                "written; set checkpoint.every"
            )
        name = evaluation.best.rpartition("/")[0]
        if name and name not in sets:
            raise ValueError(f"evaluation.best = {evaluation.best}: {unknown_name(name, sets)}")
        if not name and HELDOUT not in sets and len(sets) > 1:
            allowed = ", ".join(f"{each}/accuracy" for each in sets)
            raise ValueError(
                f"evaluation.best = {evaluation.best} with {len(sets)} sets: one of {allowed} is allowed"
            )
        return self

    @model_validator(mode="after")
    def _heldout_can_be_sampled(self) -> Self:
        for options in (self.evaluation, *self.evaluation.sets.values()):
            check_reproducible(options.min_p, self.engine, "evaluation")
        return self

    @model_validator(mode="after")
    def _engines_can_serve_the_adapter(self) -> Self:
        if self.weights.send != "adapter":
            return self
        if self.trainer.lora is None:
            raise ValueError(
                "weights.send = adapter with trainer.lora = null: there is no adapter; merged is allowed"
            )
        if self.engine.pipeline > 1 or (self.engine.nodes or 1) > 1:
            raise ValueError(
                f"weights.send = adapter with engine.pipeline = {self.engine.pipeline} and engine.nodes = "
                f"{self.engine.nodes or 1}: SGLang's LoRA is tested in engines of one stage on one node; "
                "weights.send = merged is allowed"
            )
        targets = self.trainer.lora.targets
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if 0 < len([name for name in fused if name in targets]) < len(fused):
                raise ValueError(
                    f"weights.send = adapter: SGLang computes {', '.join(fused)} as one; all of them or none "
                    "are allowed in trainer.lora.targets, or weights.send = merged"
                )
        return self

    @model_validator(mode="after")
    def _there_are_routes(self) -> Self:
        if self.save_routes and not self.samples_routes:
            raise ValueError(
                f"save_routes = true with trainer.routing_replay = {self.trainer.routing_replay}: trees have "
                "no routes then; rollout is allowed, or save_routes = false"
            )
        if self.samples_routes and self.engine.pipeline > 1:
            raise ValueError(
                f"trainer.routing_replay = rollout with engine.pipeline = {self.engine.pipeline}: SGLang "
                "returns the experts of the first stage's layers alone; none and trainer are allowed, or "
                "engine.pipeline = 1"
            )
        return self

    @model_validator(mode="after")
    def _configured_loggers_log(self) -> Self:
        """A section without its logger would be noticed after the run."""
        for name, section in (("wandb", self.wandb), ("mlflow", self.mlflow)):
            if section != type(section)() and name not in self.logging:
                raise ValueError(
                    f"{name} is configured, but logging = [{', '.join(self.logging)}] does not name it; add "
                    f"{name} to the list, or remove its section"
                )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        prompt, response = self.data.max_prompt_tokens, self.sampling.max_response_tokens
        pack, buffer = self.trainer.max_tokens_per_pack, self.reward.overlong_buffer_tokens
        if prompt + response > pack:
            raise ValueError(
                f"data.max_prompt_tokens + sampling.max_response_tokens = {prompt} + {response} = "
                f"{prompt + response} is more than trainer.max_tokens_per_pack = {pack}: a pack must hold "
                "the longest trajectory"
            )
        if buffer is not None and buffer > response:
            raise ValueError(
                f"reward.overlong_buffer_tokens = {buffer} is more than "
                f"sampling.max_response_tokens = {response}"
            )
        return self

    @model_validator(mode="after")
    def _assumed_prompts_fit(self) -> Self:
        assumed, most = self.plan.prompt_tokens, self.data.max_prompt_tokens
        if assumed is not None and assumed > most:
            raise ValueError(f"plan.prompt_tokens = {assumed} is more than data.max_prompt_tokens = {most}")
        return self

    @model_validator(mode="after")
    def _prompts_divide(self) -> Self:
        prompts, ranks = self.data.prompts_per_step, self.trainer.parallel.data
        parts = self.learning.mini_batches * ranks
        if prompts % parts:
            raise ValueError(
                f"data.prompts_per_step = {prompts} cannot be divided into learning.mini_batches x "
                f"trainer.parallel.data = {self.learning.mini_batches} x {ranks} = {parts} equal parts"
            )
        return self
