"""Grading."""

from pydantic import Field

from treepo.config.base import Section


class RewardConfig(Section):
    function: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Your own reward, `module:function`, called in the grading processes as f(prompt, response, answer,
    extra) -> float or dict (see treepo.rewards.custom); null grades mathematics with math-verify."""
    workers: int = Field(default=4, ge=1)
    """Grading processes."""
    deadline_seconds: float = Field(default=5.0, gt=0)
    """A response not graded by then is killed with its worker; verdict `timeout`."""
    memory_mb: int = Field(default=2048, ge=256)
    """Address space (MiB) that one worker may use beyond what it starts with; verdict `error` above it."""
    correct: float = 1.0
    """Reward of a correct answer."""
    wrong: float = -1.0
    """Reward of a wrong answer or of none."""
