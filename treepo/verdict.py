"""A verdict on one response. A grading process imports this module, and nothing of the trees."""

from enum import StrEnum


class Verdict(StrEnum):
    """A grader's verdict on one response. The last two are masked from training, never counted as wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def graded(self) -> bool:
        """Whether the response has a grade."""
        return self not in (Verdict.TIMEOUT, Verdict.ERROR)
