"""How many failed grades stop a run, and with which message."""

import pytest

from treepo.errors import RewardError
from treepo.rewards.failures import LEAST_FAILED, FailedGrades
from treepo.rewards.grade import Grade
from treepo.tree import Verdict

GOOD = Grade(1.0, Verdict.CORRECT)
LATE = Grade(None, Verdict.TIMEOUT, message="not graded within 5 s")
BROKEN = Grade(None, Verdict.ERROR, message="KeyError: 'x'")


def test_the_message_counts_and_shows_the_first() -> None:
    failed = FailedGrades(0.25)
    failed.add([GOOD] * 20 + [LATE] * 3)
    failed.add([BROKEN] * 7)
    with pytest.raises(RewardError) as raised:
        failed.check_and_clear("step 4")
    assert str(raised.value) == (
        "step 4: 10 of 30 responses could not be graded (7 error, 3 timeout), more than "
        "reward.max_failed_share = 0.25; the first: not graded within 5 s"
    )


@pytest.mark.parametrize(
    ("max_share", "good", "bad", "stops"),
    [
        (0.25, 30, 10, False),  # exactly a quarter
        (0.25, 30, 11, True),
        (0.0, 1000, LEAST_FAILED, True),
        (0.0, 1000, LEAST_FAILED - 1, False),
        (0.2, 0, LEAST_FAILED - 1, False),  # one hopeless prompt, sampled alone
        (1.0, 0, 1000, False),
        (0.2, 0, 0, False),
    ],
)
def test_the_share_and_the_least_count_decide(max_share: float, good: int, bad: int, stops: bool) -> None:
    failed = FailedGrades(max_share)
    failed.add([GOOD] * good + [BROKEN] * bad)
    if stops:
        with pytest.raises(RewardError, match=f"{bad} of {good + bad} responses"):
            failed.check_and_clear("step 1")
    else:
        failed.check_and_clear("step 1")


def test_each_check_judges_what_came_since_the_last() -> None:
    failed = FailedGrades(0.5)
    for _ in range(3):  # seven of seven each time, 21 in all
        failed.add([BROKEN] * (LEAST_FAILED - 1))
        failed.check_and_clear("a refill")
