"""Grading."""

from pydantic import Field

from treepo.config.base import Section


class RewardConfig(Section):
    workers: int = Field(4, ge=1)
    """Grading processes."""
    deadline_seconds: float = Field(5.0, gt=0)
    """A response not graded by then is killed with its worker; verdict `timeout`."""
    memory_mb: int = Field(2048, ge=256)
    """Address space that one worker may use beyond what it starts with."""
    correct: float = 1.0
    """Reward of a correct answer."""
    wrong: float = -1.0
    """Reward of a wrong answer or of none."""
