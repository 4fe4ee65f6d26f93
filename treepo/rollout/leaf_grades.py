"""The grades of a growing tree's leaves, for the policies that read rewards."""

from collections import Counter
from collections.abc import Sequence

from treepo.rewards.grade import Grade
from treepo.rollout.path import Node
from treepo.rollout.policies import Candidate
from treepo.tree import Stop
from treepo.verdict import Verdict


class LeafGrades:
    """read: whether the sampling policies read rewards; if not, there are no grades."""

    def __init__(self, read: bool) -> None:
        self._read = read
        self._grades: dict[Node, Grade] = {}

    def __getitem__(self, leaf: Node) -> Grade:
        return self._grades[leaf]

    def __setitem__(self, leaf: Node, grade: Grade) -> None:
        self._grades[leaf] = grade

    def agree(self) -> bool:
        """Whether several leaves have a reward, and all the same one."""
        rewards = [grade.reward for grade in self._grades.values() if grade.reward is not None]
        return len(rewards) > 1 and min(rewards) == max(rewards)

    def candidates(self, leaves: Sequence[tuple[Node, Stop]]) -> list[Candidate]:
        """The leaves, for a fallback."""
        right: Counter[Node] = Counter()
        graded: Counter[Node] = Counter()
        verdicts = self._verdicts()
        for leaf, verdict in verdicts.items():
            graded.update(leaf.path())
            right.update(leaf.path() if verdict is Verdict.CORRECT else [])
        return [
            Candidate(
                stop,
                leaf.response_log_probs(),
                [above.end for above in leaf.path()],
                right=verdicts[leaf] is Verdict.CORRECT if leaf in verdicts else None,
                below=[(right[above], graded[above]) for above in leaf.path()],
            )
            for leaf, stop in leaves
        ]

    def below(self, node: Node | None) -> tuple[int, int] | tuple[None, None]:
        """Leaves below the node or the prompt that are right, and that are graded; None if rewards are not
        read.
        """
        if not self._read:
            return None, None
        found = [verdict for leaf, verdict in self._verdicts().items() if node is None or node in leaf.path()]
        return sum(verdict is Verdict.CORRECT for verdict in found), len(found)

    def _verdicts(self) -> dict[Node, Verdict]:
        """Of the leaves that could be graded."""
        return {leaf: grade.verdict for leaf, grade in self._grades.items() if grade.verdict.graded}
