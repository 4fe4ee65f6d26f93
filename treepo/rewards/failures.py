"""Whether too many responses could not be graded: a broken grader must not starve a run unnoticed.

Judged over all responses of a step, its refills included, or of an evaluation, once they are graded. A few
failures are never too many: a prompt whose answers all hang the grader is no broken grader.
"""

from collections import Counter
from collections.abc import Iterable

from treepo.errors import RewardError
from treepo.rewards.grade import Grade
from treepo.tree import Verdict

LEAST_FAILED = 8  # fewer failures than this stop nothing, whatever their share


class FailedGrades:
    """A count of grades by verdict. max_share: of `timeout` and `error` among them."""

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
        """Raise RewardError where more than `max_share` of the grades since the last call failed.

        what: whose they are, for the message.
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
