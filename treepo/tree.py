"""A rollout tree: one prompt, the segments sampled under it, and the leaves where trajectories end.

A segment is a run of tokens sampled under one parent. Indices are topological: a parent comes before its
children. `PROMPT` is the parent of the segments that start right after the prompt. A trajectory is the path
from the prompt to a leaf; two leaves with equal tokens are two trajectories. The leaves are exactly the
childless segments.

    prompt ── 0 ──┬── 1            leaves: segments 1, 3, 4
                  └── 2 ──┬── 3    the tokens of segments 0 and 2 are shared
                          └── 4

Suffixes: `_S` one value a segment, `_L` one value a leaf, `_T` one value a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import orjson
from pydantic import Field, NonNegativeInt, TypeAdapter

from treepo.routes import RoutesRecord, fault_of_routes, from_record, to_record
from treepo.verdict import Verdict

PROMPT = -1


class Finish(StrEnum):
    """Why a segment ends."""

    LENGTH = "length"  # it has the requested length; the path may go on below it
    EOS = "eos"  # its last token ends the sequence
    CUT = "cut"  # a fallback or a branching cut it here; its first child holds the rest of its tokens


class Stop(StrEnum):
    """Why a trajectory ended."""

    BOXED = "boxed"
    EOS = "eos"
    LIMIT = "limit"  # the response reached max_response_tokens
    DEPTH = "depth"  # the path reached max_depth segments
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tokens sampled under `parent`, the index of a segment or PROMPT.

    tokens: int32 [T], T >= 1. log_probs: float32 [T], under the policy that sampled the token, temperature
    applied. versions: int32 [T], the committed weight version of that policy. It changes within a segment
    where a weight update interrupted the decoding. routes: of the tokens (`treepo.routes`), if the engine
    returned them; the last token of a leaf's segment has none. draws: children that were sampled with its
    first tokens and that it stands for, itself included (`sampling.branch.lookahead`).
    """

    parent: int
    tokens: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    finish: Finish
    routes: np.ndarray | None = None
    draws: int = 1


@dataclass(frozen=True, slots=True)
class Leaf:
    """The end of one trajectory. reward: None until it is graded, or if it cannot be graded.

    terms: added to the reward before training, by name. numbers, texts: the grader's further values, by name.
    """

    segment: int
    stop: Stop
    reward: float | None = None
    verdict: Verdict | None = None
    terms: Mapping[str, float] = field(default_factory=dict, hash=False)
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    texts: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a tree went on after all its paths had ended: below a cut of a finished answer, or at the prompt.

    parent: the segment above the cut, or PROMPT. segments: the children of `parent` that were sampled then.
    leaf: the segment of the leaf that was cut; None if the tree started again at the prompt. leaves: that the
    tree had before, the first of `Tree.leaves`. right, graded: of those below `parent`, how many were right,
    and how many were graded; None if the sampling policies read no rewards.
    """

    parent: int
    segments: tuple[int, ...]
    leaf: int | None
    leaves: int
    right: int | None = None
    graded: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """One prompt's rollout. Raises ValueError if the parts do not form a tree.

    prompt_routes: of the prompt's tokens. All tokens have routes, or None.
    """

    prompt_id: str
    # Not shown: a loop of asyncio formats the result of its task when it restores a signal.
    prompt: np.ndarray = field(repr=False)  # int32 [T]
    segments: tuple[Segment, ...] = field(repr=False)
    leaves: tuple[Leaf, ...] = field(repr=False)
    prompt_routes: np.ndarray | None = field(default=None, repr=False)
    cuts: tuple[Cut, ...] = field(default=(), repr=False)  # in the order of sampling
    agreed: bool = False  # whether it has its least number of leaves because their rewards were equal

    def __post_init__(self) -> None:
        has_child = [False] * len(self.segments)
        for index, segment in enumerate(self.segments):
            if not PROMPT <= segment.parent < index:
                raise ValueError(f"tree {self.prompt_id}: segment {index} has parent {segment.parent}")
            if not 0 < len(segment.tokens) == len(segment.log_probs) == len(segment.versions):
                raise ValueError(
                    f"tree {self.prompt_id}: segment {index} has {len(segment.tokens)} tokens, "
                    f"{len(segment.log_probs)} log-probs and {len(segment.versions)} versions"
                )
            if segment.draws < 1:
                raise ValueError(f"tree {self.prompt_id}: segment {index} has {segment.draws} draws")
            if segment.parent != PROMPT:
                has_child[segment.parent] = True
        childless = [index for index, parent in enumerate(has_child) if not parent]
        if sorted(leaf.segment for leaf in self.leaves) != childless:
            raise ValueError(f"tree {self.prompt_id}: its leaves are not exactly its childless segments")
        added: set[int] = set()
        for cut in self.cuts:
            fits = cut.leaf is None or cut.leaf in childless
            for segment in cut.segments:
                fits &= 0 <= segment < len(self.segments) and self.segments[segment].parent == cut.parent
                fits &= segment not in added
                added.add(segment)
            if not fits:
                raise ValueError(f"tree {self.prompt_id}: it has no such cut: {cut}")
        self._check_routes()

    def _check_routes(self) -> None:
        parts = [("the prompt", self.prompt, self.prompt_routes)]
        parts += [(f"segment {index}", each.tokens, each.routes) for index, each in enumerate(self.segments)]
        for name, tokens, routes in parts:
            if fault := fault_of_routes(routes, len(tokens), self.prompt_routes):
                raise ValueError(f"tree {self.prompt_id}: {name} has {fault}")

    def path(self, segment: int) -> list[int]:
        """List segment indices from the prompt's child down to `segment`, both included."""
        path = []
        while segment != PROMPT:
            path.append(segment)
            segment = self.segments[segment].parent
        return path[::-1]

    def response(self, leaf: Leaf) -> np.ndarray:
        """Concatenate the tokens of the trajectory that ends at `leaf`, without the prompt: int32 [T]."""
        return np.concatenate([self.segments[index].tokens for index in self.path(leaf.segment)])

    def unique_tokens(self) -> int:
        """Count the response tokens in the tree, a shared token once."""
        return sum(len(segment.tokens) for segment in self.segments)

    def total_tokens(self) -> int:
        """Count the response tokens of all trajectories: as many as independent samples would decode."""
        depth_S = np.zeros(len(self.segments), dtype=np.int64)
        for index, segment in enumerate(self.segments):
            above = depth_S[segment.parent] if segment.parent != PROMPT else 0
            depth_S[index] = above + len(segment.tokens)
        return int(sum(depth_S[leaf.segment] for leaf in self.leaves))

    def graded(self, grades: list[tuple[float | None, Verdict]]) -> "Tree":
        """Set a reward and a verdict on each leaf, in the order of `leaves`."""
        leaves = (
            replace(leaf, reward=reward, verdict=verdict)
            for leaf, (reward, verdict) in zip(self.leaves, grades, strict=True)
        )
        return replace(self, leaves=tuple(leaves))


_Run = Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]  # a version, a number of tokens


class _SegmentRecord(TypedDict):
    parent: int
    version: NonNegativeInt | list[_Run]
    finish: str
    tokens: list[int]
    log_probs: list[float]
    draws: NotRequired[Annotated[int, Field(ge=1, lt=2**31)]]
    routes: NotRequired[RoutesRecord]


class _LeafRecord(TypedDict):
    segment: int
    stop: str
    reward: float | None
    verdict: str | None
    terms: NotRequired[dict[str, object]]
    numbers: NotRequired[dict[str, object]]
    texts: NotRequired[dict[str, object]]


class _CutRecord(TypedDict):
    parent: int
    segments: list[int]
    leaf: int | None
    leaves: NonNegativeInt
    right: int | None
    graded: int | None


class _Record(TypedDict):
    """A line of JSON, without extra keys."""

    prompt_id: str
    prompt: list[int]
    segments: list[_SegmentRecord]
    leaves: list[_LeafRecord]
    cuts: NotRequired[list[_CutRecord]]
    agreed: NotRequired[bool]
    prompt_routes: NotRequired[RoutesRecord]


_RECORD = TypeAdapter(_Record)


def to_json(tree: Tree, *, routes: bool = False, **extra: object) -> bytes:
    """Write the tree, and `extra` keys, as one line of JSON with its newline.

    Each float has the fewest digits that read back as the same float32. A segment's version is a number, or
    runs if it changes: `[[3, 40], [4, 24]]` is version 3 for 40 tokens, then version 4 for 24. routes:
    whether a tree's routes are written too, if it has them (`treepo.routes.RoutesRecord`); they are long.
    """
    record = {
        "prompt_id": tree.prompt_id,
        **extra,
        "prompt": tree.prompt,
        "segments": [
            {
                "parent": segment.parent,
                "version": _runs(segment.versions),
                "finish": segment.finish,
                "tokens": segment.tokens,
                "log_probs": segment.log_probs,
                **({"draws": segment.draws} if segment.draws != 1 else {}),
                **_routes("routes", segment.routes, routes),
            }
            for segment in tree.segments
        ],
        "leaves": [
            {
                "segment": leaf.segment,
                "stop": leaf.stop,
                "reward": leaf.reward,
                "verdict": leaf.verdict,
                "terms": leaf.terms,
                "numbers": leaf.numbers,
                "texts": leaf.texts,
            }
            for leaf in tree.leaves
        ],
        **_routes("prompt_routes", tree.prompt_routes, routes),
    }
    if tree.cuts:
        record["cuts"] = tree.cuts
    if tree.agreed:
        record["agreed"] = True
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def from_json(line: bytes | str) -> Tree:
    """Read a line that `to_json` wrote, with or without routes.

    Extra keys are ignored, and a leaf may lack values by name.

    Raises ValueError or OverflowError for any other line.
    """
    record: Any = _RECORD.validate_python(orjson.loads(line), strict=True)
    return Tree(
        prompt_id=record["prompt_id"],
        prompt=np.asarray(record["prompt"], dtype=np.int32),
        segments=tuple(
            Segment(
                parent=segment["parent"],
                tokens=np.asarray(segment["tokens"], dtype=np.int32),
                log_probs=_log_probs(segment["log_probs"]),
                versions=_versions(segment["version"], len(segment["tokens"])),
                finish=Finish(segment["finish"]),
                routes=_read_routes(segment, "routes"),
                draws=segment.get("draws", 1),
            )
            for segment in record["segments"]
        ),
        leaves=tuple(
            Leaf(
                segment=leaf["segment"],
                stop=Stop(leaf["stop"]),
                reward=leaf["reward"],
                verdict=None if leaf["verdict"] is None else Verdict(leaf["verdict"]),
                terms=leaf.get("terms", {}),
                numbers=leaf.get("numbers", {}),
                texts=leaf.get("texts", {}),
            )
            for leaf in record["leaves"]
        ),
        cuts=tuple(Cut(**{**cut, "segments": tuple(cut["segments"])}) for cut in record.get("cuts", [])),
        agreed=record.get("agreed", False),
        prompt_routes=_read_routes(record, "prompt_routes"),
    )


def _routes(key: str, routes: np.ndarray | None, written: bool) -> dict[str, RoutesRecord]:
    """The routes under their key; nothing if there are none or they are not written."""
    return {} if routes is None or not written else {key: to_record(routes)}


def _read_routes(record: Mapping[str, Any], key: str) -> np.ndarray | None:
    return from_record(record[key]) if key in record else None


def _log_probs(values: list[float]) -> np.ndarray:
    """float32 [T]. Raises ValueError for a number that is not finite there."""
    with np.errstate(over="ignore"):
        log_probs = np.asarray(values, dtype=np.float32)
    if not np.isfinite(log_probs).all():
        raise ValueError("a log-prob is beyond the numbers of float32")
    return log_probs


def _runs(versions: np.ndarray) -> int | list[tuple[int, int]]:
    """The version of all tokens, or a pair (version, number of tokens) for each run of equal versions."""
    edges = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    runs = [(int(versions[start]), stop - start) for start, stop in pairwise(edges)]
    return runs if len(runs) > 1 else runs[0][0]


def _versions(version: int | list[list[int]], tokens: int) -> np.ndarray:
    """What `_runs` made of the versions of `tokens` tokens: int32 [T]."""
    if isinstance(version, int):
        return np.full(tokens, version, dtype=np.int32)
    counts = [count for _, count in version]
    if 0 in counts or sum(counts) != tokens:
        raise ValueError(f"the versions {version} do not cover the {tokens} tokens of their segment")
    return np.repeat(np.array([number for number, _ in version], dtype=np.int32), counts)
