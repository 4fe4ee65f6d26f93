"""The record of a growing tree's fallback cuts: what `treepo.tree.Cut` says, while nodes still split."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from treepo.rollout.path import Node, PathRequest
from treepo.tree import PROMPT, Cut


@dataclass(slots=True, eq=False)
class _GrowingCut:
    """A Cut whose segments are still nodes. nodes: sampled below `parent` because of this cut."""

    parent: Node | None
    leaf: Node | None
    leaves: int
    right: int | None
    graded: int | None
    nodes: list[Node] = field(default_factory=list)


class CutRecord:
    """The cuts of one tree, in the order of sampling."""

    def __init__(self) -> None:
        self._cuts: list[_GrowingCut] = []
        self._cut_of: dict[int, _GrowingCut] = {}  # by the number of a path request

    def add(
        self,
        parent: Node | None,
        leaf: Node | None,
        leaves: int,
        counts: tuple[int, int] | tuple[None, None],
        numbers: range,
    ) -> None:
        """Record a cut. counts: of `LeafGrades.below`. numbers: of the path requests below `parent`; the rest
        as in Cut.
        """
        cut = _GrowingCut(parent, leaf, leaves, *counts)
        self._cuts.append(cut)
        self._cut_of.update(dict.fromkeys(numbers, cut))

    def round_ended(self, path: PathRequest) -> None:
        """If a cut made the path request, its first node is the cut's."""
        if (cut := self._cut_of.pop(path.number, None)) is not None:
            cut.nodes.append(path.new_nodes[0])

    def split(self, node: Node, upper: Node) -> None:
        """`upper` took the place of `node` below their parent."""
        for cut in self._cuts:
            cut.nodes = [upper if one is node else one for one in cut.nodes]

    def finished(self, index_of: Mapping[Node, int]) -> tuple[Cut, ...]:
        """The cuts of the complete tree. index_of: each node's segment."""
        return tuple(
            Cut(
                parent=PROMPT if cut.parent is None else index_of[cut.parent],
                segments=tuple(index_of[node] for node in cut.nodes),
                leaf=None if cut.leaf is None else index_of[cut.leaf],
                leaves=cut.leaves,
                right=cut.right,
                graded=cut.graded,
            )
            for cut in self._cuts
        )
