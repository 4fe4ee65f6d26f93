"""What `treepo rollout` needs: a model, prompts, how to sample; its sections are those of training."""

from pydantic import Field

from treepo.config.base import PathField, Section
from treepo.config.data import RolloutDataConfig
from treepo.config.engine import EngineConfig
from treepo.config.run import ModelConfig
from treepo.config.sampling import SamplingConfig


class RolloutConfig(Section):
    out: PathField
    """The folder to write to: trees, summary, config, log."""
    seed: int = Field(default=0, ge=0)
    """Of everything random; the same seed samples the same trees as far as the engine does."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Only the first so many usable prompts; all of them by default."""
    model: ModelConfig
    """The model that samples; its dtype is the engine's."""
    data: RolloutDataConfig
    """Prompts."""
    sampling: SamplingConfig = SamplingConfig()
    """How trees are sampled; a schedule stands at its first step."""
    engine: EngineConfig = EngineConfig()
    """The sampler."""
