"""Held-out accuracy: sequential samples of fixed problems, drawn the same way each time."""

from treepo.config.sampling import SamplingConfig
from treepo.config.schema import RunConfig


def evaluation_sampling(config: RunConfig) -> SamplingConfig:
    """The training's lengths and stops, but independent samples at the evaluation's temperature."""
    return config.sampling.model_copy(
        update={
            "mode": "sequential",
            "width": config.evaluation.samples,
            "temperature": config.evaluation.temperature,
        }
    )
