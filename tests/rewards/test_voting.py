"""Classes of mathematically equal answers, which vote together."""

import asyncio
from collections.abc import Sequence

from treepo.rewards.pool import RewardPool
from treepo.rewards.voting import NO_VOTE, Equal, pool_equality, vote_classes
from treepo.tree import Verdict

C, W, N, T = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.TIMEOUT


def classes(answers: Sequence[str | None], verdicts: list[Verdict], equal: Equal) -> list[int]:
    return asyncio.run(vote_classes(answers, verdicts, equal))


async def same_parity(first: str, second: str) -> bool | None:
    """Equality of the last letters; with a `?` it cannot be decided."""
    return None if "?" in first + second else first[-1] == second[-1]


def test_wrong_answers_are_grouped_and_correct_ones_are_one_class() -> None:
    answers = ["ab", "1", "cb", "one", "d", "cb", None, "9"]
    got = classes(answers, [W, C, W, C, W, W, N, T], same_parity)
    assert got[0] == got[2] == got[5]
    assert got[1] == got[3]
    assert len({got[0], got[1], got[4]}) == 3
    assert got[6] == got[7] == NO_VOTE


def test_an_answer_that_cannot_be_compared_equals_its_own_text_only() -> None:
    for order in (["a", "?", "ba", "?", "b"], ["?", "a", "?", "ba", "b"]):
        of = dict(zip(order, classes(order, [W] * 5, same_parity), strict=True))
        assert of["a"] == of["ba"]
        assert len({of["a"], of["?"], of["b"]}) == 3


def test_integers_are_compared_without_asking_anyone() -> None:
    async def never(first: str, second: str) -> bool | None:
        raise AssertionError((first, second))

    huge = "9" * 10_000
    got = classes(["7", "+07", "-7", "0", "-0", huge, f"0{huge}"], [W] * 7, never)
    assert got == [got[0], got[0], got[2], got[3], got[3], got[5], got[5]]
    assert len(set(got)) == 4


def test_equality_is_mathematical(math_pool: RewardPool) -> None:
    answers = [r"\frac{1}{2}", "0.5", "x+1", "1+x", "0.50", "}{", r"\boxed{3}", "3"]
    got = classes(answers, [W] * len(answers), pool_equality(math_pool))
    assert got[0] == got[1] == got[4]
    assert got[2] == got[3]
    assert len({got[0], got[2], got[5], got[6], got[7]}) == 5
