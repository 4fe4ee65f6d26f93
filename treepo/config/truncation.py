"""Where tokens may be left out of sampling by `top_p`, `top_k` and `min_p` (docs/sampling.md), and
the line that says how was sampled.
"""

from collections.abc import Mapping
from typing import Any

from treepo.config.engine import EngineConfig
from treepo.config.sampling import SamplingConfig


def truncation(sampling: SamplingConfig) -> dict[str, float]:
    """Those of the three keys that leave tokens out."""
    given = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    fields = SamplingConfig.model_fields
    return {key: value for key, value in given.items() if value is not None and value != fields[key].default}


def sampling_line(sampling: Mapping[str, Any], of: str) -> str:
    """How was sampled, in one line: "16 independent samples for each problem · temperature 0.6 · top_k 20".

    sampling: the keys of the section; results of before tokens could be left out lack three of them. of: what
    the samples are for.
    """
    how = "leaves of a tree" if sampling["mode"] == "tree" else "independent samples"
    fields = SamplingConfig.model_fields
    given = {key: sampling.get(key, fields[key].default) for key in ("top_p", "top_k", "min_p")}
    return " · ".join(
        [
            f"{sampling['width']} {how} for each {of}",
            f"temperature {sampling['temperature']}",
            *(f"{key} {value}" for key, value in given.items() if value != fields[key].default),
            f"up to {sampling['max_response_tokens']} tokens",
        ]
    )


def whole_distribution(sampling: SamplingConfig) -> SamplingConfig:
    """Validate the sampling of training."""
    for key, value in truncation(sampling).items():
        raise ValueError(
            f"{key} = {value:g}: training samples from all tokens; the log-probs of engine and trainer are "
            "those before tokens are left out, so with this key they would not be those of the draw, and the "
            "importance ratios would be biased; evaluations and rollouts take it"
        )
    if sampling.from_model:
        raise ValueError(
            "from_model = true: training samples from all tokens at the temperature that is given; false is "
            "allowed"
        )
    return sampling


def check_reproducible(min_p: float, engine: EngineConfig, section: str = "sampling") -> None:
    """Raise ValueError for a combination that would end SGLang's process. section: that of `min_p`."""
    if min_p and engine.sglang.get("enable_deterministic_inference"):
        raise ValueError(
            f"{section}.min_p = {min_p:g} with engine.sglang.enable_deterministic_inference: SGLang "
            "has no min_p for draws by seed; 0 is allowed, and top_p and top_k are"
        )
