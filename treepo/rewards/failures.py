"""Stop a run if too many responses cannot be graded: a broken grader must not starve it unnoticed.

The share is taken over all responses of a step (its refills included) or of an evaluation, after grading. A
few failures never stop a run: one prompt whose answers all hang the grader does not mean that it is broken.
"""

from collections import Counter
from collections.abc import Iterable

from treepo.errors import RewardError
from treepo.rewards.grade import Grade
from treepo.verdict import Verdict

LEAST_FAILED = 8  # fewer failures do not stop a run, whatever their share


class FailedGrades:
    """Counts grades by verdict. max_share: the largest share of `timeout` and `error` that is allowed."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._count: Counter[Verdict] = Counter()
        self._first: str | None = None

    def add(self, grades: Iterable[Grade]) -> None:
        for grade in grades:
            self._count[grade.verdict] += 1
            if not grade.verdict.graded:
                self._first = self._first or grade.message

    def check_and_clear(self, what: str) -> None:
        """Raise RewardError if more than `max_share` of the grades since the last call failed.

        what: what was graded, for the message.
        """
        timeouts, errors = self._count[Verdict.TIMEOUT], self._count[Verdict.ERROR]
        failed, total, first = timeouts + errors, self._count.total(), self._first
        self._count.clear()
        self._first = None
        if failed >= LEAST_FAILED and failed > self._max_share * total:
            raise RewardError(
                f"{what}: {failed} of {total} responses could not be graded ({errors} error, {timeouts} "
                f"timeout), more than reward.max_failed_share = {self._max_share:g}; the first: {first}"
            )
