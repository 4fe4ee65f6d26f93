"""The configuration of `treepo rollout`: a model, prompts, sampling. Its sections are those of training."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from treepo.config.base import PathField, Section
from treepo.config.data import RolloutDataConfig
from treepo.config.engine import EngineConfig
from treepo.config.run import ModelConfig
from treepo.config.sampling import SamplingConfig, untrained
from treepo.config.truncation import check_reproducible


class RolloutConfig(Section):
    out: PathField
    """The folder for trees, summary, config and log."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random. The same seed gives the same trees, as far as the engine samples by seed.
    Any whole number from 0."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Most usable prompts, from the start of the data; all of them by default."""
    model: ModelConfig
    """The model that samples; its dtype is the engine's."""
    data: RolloutDataConfig
    """Prompts."""
    sampling: Annotated[SamplingConfig, AfterValidator(untrained)] = SamplingConfig()
    """How trees are sampled; schedules stay at their first step."""
    engine: EngineConfig = EngineConfig()
    """The engines that sample."""

    @model_validator(mode="after")
    def _min_p_is_possible(self) -> Self:
        check_reproducible(self.sampling.min_p, self.engine)
        return self
