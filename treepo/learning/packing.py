# ruff: noqa: N815 - the suffix names the dimension (CONTRIBUTING.md)
"""Pack trees into micro-batches in which a shared token occurs, and is trained, once.

A pack is a forest of tokens in depth-first order; a token's ancestors are the earlier tokens whose subtrees
contain it. A tree that is longer than a pack is split between segments. Each piece begins with the path
above its first segment as context that is not trained, so every token still sees exactly its own path and is
trained in exactly one piece. Nodes without a graded leaf below them are not packed.

`pack_flat` packs whole trajectories that share nothing: the baseline, with the same loss and gradient.

Suffixes as in treepo.learning.forest, and `_R`: a run, the tokens of one node in one pack.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise

import numpy as np

from treepo.learning.advantage import Advantages
from treepo.learning.forest import Forest, Levels
from treepo.learning.splitting import split_trees
from treepo.routes import no_route
from treepo.tree import PROMPT, Tree


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A forest of T tokens in depth-first order.

    Token i may attend to token j iff j <= i < exit[j]; that is the whole attention mask. Token i is token
    `offset[i]` of segment `segment[i]` of tree `tree[i]` of the mini-batch.

    A leaf's token weight is 1 unless `leaf_weights` or `normalisation: sequence_mean` changes it.
    """

    token: np.ndarray  # int32 [T]
    position: np.ndarray  # int32 [T], depth on the token's own path
    exit: np.ndarray  # int32 [T], index one past the token's subtree
    source: np.ndarray  # int32 [T], index whose hidden state predicts this token; -1 for a tree's first token
    advantage_pos: np.ndarray  # float64 [T], weighted sum of the positive advantages of the leaves below
    advantage_neg: np.ndarray  # float64 [T], weighted sum of the negative ones
    count_pos: np.ndarray  # float64 [T], token weight behind advantage_pos (an advantage of 0 counts here)
    count_neg: np.ndarray  # float64 [T], token weight behind advantage_neg; both 0: context only, not trained
    rollout_log_prob: np.ndarray  # float32 [T], the engine's; 0 on the prompt
    version: np.ndarray  # int32 [T], weight version that sampled the token; -1 on the prompt
    tree: np.ndarray  # int32 [T], -1 on padding
    segment: np.ndarray  # int32 [T], PROMPT on the prompt
    offset: np.ndarray  # int32 [T]
    leaf_weight: float  # summed weight of the leaves whose last token is trained here
    old_log_prob: np.ndarray | None = None  # float32 [T], the trainer's before this step's updates
    reference_log_prob: np.ndarray | None = None  # float32 [T], the reference model's
    route: np.ndarray | None = None  # uint8 or uint16 [T, layers, k] (treepo.routes), if the trees have

    def __len__(self) -> int:
        return len(self.token)

    def columns(self) -> dict[str, np.ndarray]:
        """The fields with one value or row a token that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


# All other columns are padded with 0, and routes with no route.
PADDING = {"tree": -1, "segment": PROMPT, "version": -1, "source": -1}


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Runs that must share a pack: a tree, a part of one with the path above it, or one trajectory.

    node_R: each run's node. above_R: the run of its parent in this piece, -1 for the prompt's run.
    weight_R: [4, R], the runs' advantage_pos, advantage_neg, count_pos, count_neg; 0 on context.
    """

    node_R: np.ndarray
    above_R: np.ndarray
    weight_R: np.ndarray
    tokens: int
    leaf_weight: float


def split_mini_batches(
    trees: Sequence[Tree], advantages: Advantages, parts: int
) -> list[tuple[Sequence[Tree], Advantages]]:
    """Divide the batch into at most `parts` mini-batches of whole trees, of as equal numbers as possible."""
    edges = np.linspace(0, len(trees), min(parts, len(trees)) + 1).round().astype(int).tolist()
    return [(trees[start:stop], advantages.part(start, stop)) for start, stop in pairwise(edges)]


def pack_trees(
    trees: Sequence[Tree], advantages: Advantages, max_tokens: int, replicas: int
) -> list[list[Pack]]:
    """Pack `trees` for each of `replicas` data-parallel replicas: at least one pack each, of at most
    `max_tokens` tokens.

    Replicas get about equally many tokens, repeated context included. `advantages` are those of `trees`.
    Raises ValueError if a trajectory is longer than a pack, a prompt is empty, or only some of the trees have
    routes.
    """
    forest = _checked_forest(trees, advantages, max_tokens)
    weight_N = node_weights(advantages)
    leaf_weight_N = np.zeros(len(forest.parent_N))
    leaf_weight_N[forest.leaf_node_L] = advantages.leaf_weight_L
    pieces = []
    slot_N = np.empty(len(forest.parent_N), dtype=np.int64)
    for node_R, context_runs in split_trees(forest, max_tokens):
        weight_R = weight_N[:, node_R]
        weight_R[:, :context_runs] = 0.0
        leaf_weight = float(leaf_weight_N[node_R[context_runs:]].sum())
        pieces.append(_piece(forest, node_R, slot_N, weight_R, leaf_weight))
    return _pack(trees, forest, pieces, max_tokens, replicas)


def pack_flat(
    trees: Sequence[Tree], advantages: Advantages, max_tokens: int, replicas: int
) -> list[list[Pack]]:
    """Pack as `pack_trees` does, but every trajectory as a sequence of its own: nothing is shared."""
    forest = _checked_forest(trees, advantages, max_tokens)
    weight_M = np.stack(_weights(forest, advantages))
    slot_N = np.empty(len(forest.parent_N), dtype=np.int64)
    pieces = []
    for leaf in np.flatnonzero(advantages.token_weight_L).tolist():
        path = slice(*forest.path_offset_L[leaf : leaf + 2].tolist())
        node_R = np.concatenate([forest.first_P[forest.tree_L[leaf], None], forest.path_node_M[path]])
        weight_R = np.concatenate([np.zeros((4, 1)), weight_M[:, path]], axis=1)
        pieces.append(_piece(forest, node_R, slot_N, weight_R, float(advantages.leaf_weight_L[leaf])))
    return _pack(trees, forest, pieces, max_tokens, replicas)


def node_weights(advantages: Advantages) -> np.ndarray:
    """The advantage_pos, advantage_neg, count_pos and count_neg of each node's tokens: [4, N]."""
    forest = advantages.forest
    return np.stack([
        np.bincount(forest.path_node_M, weight_M, len(forest.parent_N))
        for weight_M in _weights(forest, advantages)
    ])  # fmt: skip


def padded(pack: Pack, length: int) -> Pack:
    """Extend `pack` to `length` with untrained tokens, each of which sees only itself."""
    filling = PADDING if pack.route is None else PADDING | {"route": no_route(pack.route.dtype)}
    columns = {
        name: np.pad(
            column,
            [(0, length - len(pack)), *[(0, 0)] * (column.ndim - 1)],
            constant_values=filling.get(name, 0),
        )
        for name, column in pack.columns().items()
    }
    columns["exit"][len(pack) :] = np.arange(len(pack), length) + 1
    return replace(pack, **columns)


def head(pack: Pack, trained: int) -> Pack:
    """The first tokens of `pack`, up to and with the `trained`-th trained one; all if it has no more."""
    counted = np.cumsum(pack.count_pos + pack.count_neg > 0)
    length = min(len(pack), int(np.searchsorted(counted, trained)) + 1)
    columns = {name: column[:length] for name, column in pack.columns().items()}
    return replace(pack, **columns | {"exit": np.minimum(columns["exit"], length)})


def blank_pack() -> Pack:
    """One untrained token, so that a replica with nothing to train still joins the collectives."""
    zero, none = np.zeros(1, dtype=np.int32), np.full(1, -1, dtype=np.int32)
    weight = np.zeros(1)
    return Pack(
        token=zero,
        position=zero,
        exit=zero + 1,
        source=none,
        advantage_pos=weight,
        advantage_neg=weight,
        count_pos=weight,
        count_neg=weight,
        rollout_log_prob=weight.astype(np.float32),
        old_log_prob=weight.astype(np.float32),
        reference_log_prob=weight.astype(np.float32),
        version=none,
        tree=none,
        segment=none,
        offset=zero,
        leaf_weight=0.0,
    )


def _checked_forest(trees: Sequence[Tree], advantages: Advantages, max_tokens: int) -> Forest:
    forest = advantages.forest
    assert len(trees) == len(forest.first_P) - 1, "advantages of other trees"
    longest = forest.path_tokens_N.max(initial=0)
    if longest > max_tokens:
        raise ValueError(f"a trajectory has {longest} tokens with its prompt; a pack holds {max_tokens}")
    if (forest.length_N == 0).any():
        raise ValueError("a prompt has no tokens: nothing would predict the first token of its response")
    return forest


def _weights(forest: Forest, advantages: Advantages) -> list[np.ndarray]:
    """Four [M]: what each step of a path adds to advantage_pos, advantage_neg, count_pos and count_neg."""
    weight_M = advantages.token_weight_L[forest.path_leaf_M]
    positive_M = advantages.value_M >= 0
    return [
        weight_M * np.maximum(advantages.value_M, 0.0),
        weight_M * np.minimum(advantages.value_M, 0.0),
        weight_M * positive_M,
        weight_M * ~positive_M,
    ]


def _piece(
    forest: Forest, node_R: np.ndarray, slot_N: np.ndarray, weight_R: np.ndarray, leaf_weight: float
) -> _Piece:
    """The piece of these runs. slot_N: scratch space."""
    slot_N[node_R] = np.arange(len(node_R))
    parent = forest.parent_N[node_R]
    return _Piece(
        node_R=node_R,
        above_R=np.where(parent >= 0, slot_N[parent], -1),
        weight_R=weight_R,
        tokens=int(forest.length_N[node_R].sum()),
        leaf_weight=leaf_weight,
    )


def _pack(
    trees: Sequence[Tree],
    forest: Forest,
    pieces: list[_Piece],
    max_tokens: int,
    replicas: int,
) -> list[list[Pack]]:
    columns = _Columns(trees, forest)
    return [
        columns.build(_fill(share, max_tokens)) if share else [blank_pack()]
        for share in _balance(pieces, replicas)
    ]


def _balance(pieces: list[_Piece], replicas: int) -> list[list[_Piece]]:
    """Give each piece, longest first, to the replica with the fewest tokens; shares stay longest first."""
    shares: list[list[_Piece]] = [[] for _ in range(replicas)]
    loads = [(0, replica) for replica in range(replicas)]
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        load, replica = heapq.heappop(loads)
        shares[replica].append(piece)
        heapq.heappush(loads, (load + piece.tokens, replica))
    return shares


def _fill(pieces: list[_Piece], max_tokens: int) -> list[list[_Piece]]:
    """Best fit: put each piece, longest first, into the fullest pack that still holds it."""
    packs: list[list[_Piece]] = []
    rooms: list[tuple[int, int]] = []  # sorted (tokens left, pack)
    for piece in pieces:
        place = bisect_left(rooms, (piece.tokens, 0))
        room, index = rooms.pop(place) if place < len(rooms) else (max_tokens, len(packs))
        if index == len(packs):
            packs.append([])
        packs[index].append(piece)
        insort(rooms, (room - piece.tokens, index))
    return packs


def _routes(trees: Sequence[Tree]) -> list[np.ndarray]:
    """The routes of each node, none if no tree has any.

    Raises ValueError if only some trees have, or if they are not of one model.
    """
    kinds = [_kind(tree.prompt_routes) for tree in trees]
    for tree, kind in zip(trees, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"the tree of prompt {trees[0].prompt_id} has {kinds[0]}, but that of {tree.prompt_id} has "
                f"{kind}"
            )
    nodes = ((tree.prompt_routes, *(segment.routes for segment in tree.segments)) for tree in trees)
    return [routes for routes in chain.from_iterable(nodes) if routes is not None]


def _kind(routes: np.ndarray | None) -> str:
    if routes is None:
        return "no routes"
    return f"routes of {routes.shape[1]} layers with {routes.shape[2]} experts each ({routes.dtype})"


class _Columns:
    """Writes the token columns of many packs at a time."""

    def __init__(self, trees: Sequence[Tree], forest: Forest) -> None:
        self._forest = forest
        self._above_N = forest.path_tokens_N - forest.length_N
        self._tokens: list[np.ndarray] = []
        self._log_probs: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self._routes = _routes(trees)
        for tree in trees:
            self._tokens.append(tree.prompt)
            self._log_probs.append(np.zeros(len(tree.prompt), dtype=np.float32))
            self._versions.append(np.full(len(tree.prompt), -1, dtype=np.int32))
            for segment in tree.segments:
                self._tokens.append(segment.tokens)
                self._log_probs.append(segment.log_probs)
                self._versions.append(segment.versions)

    def build(self, packs: list[list[_Piece]]) -> list[Pack]:
        """Make one pack of each list of pieces; all packs are views of the same arrays."""
        pieces = [piece for pack in packs for piece in pack]
        runs_of_piece = np.array([len(piece.node_R) for piece in pieces])
        first_run = np.repeat(np.cumsum(runs_of_piece) - runs_of_piece, runs_of_piece)
        node_R = np.concatenate([piece.node_R for piece in pieces])
        above_R = np.concatenate([piece.above_R for piece in pieces])
        above_R = np.where(above_R >= 0, above_R + first_run, -1)

        tokens = [sum(piece.tokens for piece in pack) for pack in packs]
        edges = np.concatenate([[0], np.cumsum(tokens)])
        runs = [sum(len(piece.node_R) for piece in pack) for pack in packs]
        weight_R = np.concatenate([piece.weight_R for piece in pieces], axis=1)
        columns = self._token_columns(node_R, above_R, np.repeat(edges[:-1], runs), weight_R)
        return [
            Pack(
                **{name: column[start:stop] for name, column in columns.items()},
                leaf_weight=sum(piece.leaf_weight for piece in pack),
            )
            for pack, start, stop in zip(packs, edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]

    def _token_columns(
        self, node_R: np.ndarray, above_R: np.ndarray, pack_start_R: np.ndarray, weight_R: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Every column of the packs with these runs, the packs' tokens one after another: [T] each."""
        forest = self._forest
        length_R = forest.length_N[node_R]
        end_R = np.cumsum(length_R)
        start_R = end_R - length_R
        exit_R = Levels(above_R, forest.depth_N[node_R]).up(end_R, np.maximum)

        def spread(value_R: np.ndarray, dtype: type = np.int32) -> np.ndarray:
            return np.repeat(value_R.astype(dtype), length_R)

        index = np.arange(end_R[-1], dtype=np.int32)
        offset = index - spread(start_R)
        source = index - spread(pack_start_R + 1)
        source[start_R] = np.where(above_R >= 0, end_R[above_R] - 1 - pack_start_R, -1)
        nodes = node_R.tolist()
        routes = {"route": np.concatenate([self._routes[node] for node in nodes])} if self._routes else {}
        return routes | {
            "token": np.concatenate([self._tokens[node] for node in nodes], dtype=np.int32),
            "position": offset + spread(self._above_N[node_R]),
            "exit": spread(exit_R - pack_start_R),
            "source": source,
            "advantage_pos": spread(weight_R[0], np.float64),
            "advantage_neg": spread(weight_R[1], np.float64),
            "count_pos": spread(weight_R[2], np.float64),
            "count_neg": spread(weight_R[3], np.float64),
            "rollout_log_prob": np.concatenate([self._log_probs[node] for node in nodes]),
            "version": np.concatenate([self._versions[node] for node in nodes]),
            "tree": spread(forest.tree_N[node_R]),
            "segment": spread(node_R - forest.first_P[forest.tree_N[node_R]] - 1),
            "offset": offset,
        }
