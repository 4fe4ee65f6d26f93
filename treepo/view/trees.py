"""The part "Trees" of the page: trees of runs, evaluations and rollouts, and the texts of their segments.

A node is the prompt, 0, or a segment, from 1. A number that is not finite is null.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from threading import Lock
from typing import Any

import numpy as np

from treepo.data.output_folder import HELDOUT_TREES
from treepo.learning.estimators import Batch
from treepo.learning.forest import Forest
from treepo.tree import PROMPT, Cut, Tree
from treepo.view.part import Part, Query, number
from treepo.view.sources import Source
from treepo.view.trees_index import VERDICTS, TreesIndex
from treepo.view.trees_text import TokenTexts, questions
from treepo.view.trees_weights import StepWeights, read_config

_FILES = (
    "vendor/d3-hierarchy.min.js",
    "page/trees.css",
    "page/trees-list.js",
    "page/trees-drawing.js",
    "page/trees.js",
)
_UPDATE_SECONDS = 0.25  # of an answer
_MOST_ROWS = 20_000  # of an answer
_MOST_TOKENS = 4_000  # of an answer
_EXPORTED_TOKENS = 400_000  # of an exported file, about 12 MB
_LARGEST = 2**53  # of a number that the page sends


def trees_part(sources: Sequence[Source]) -> Part:
    """The tab "Trees" of these sources."""
    all_trees = [SourceTrees(source) for source in sources]

    def question(ask: Callable[[SourceTrees, Query], object]) -> Callable[[Query], object]:
        def answer(query: Query) -> object:
            trees = all_trees[number(query, "source", len(all_trees))]
            with trees.lock:
                return ask(trees, query)

        return answer

    def exported() -> Iterator[tuple[str, Query]]:
        for place, trees in enumerate(all_trees):
            for name, query in trees.exported(_EXPORTED_TOKENS // len(all_trees)):
                yield name, {"source": str(place), **query}

    asks = (SourceTrees.rows, SourceTrees.prompts, SourceTrees.tree, SourceTrees.text)
    answers = {ask.__name__: question(ask) for ask in asks}
    return Part("trees", "Trees", _FILES, answers, exported)


class SourceTrees:
    """The trees of one source, and the answers about them. lock: held while one is worked out.

    The methods raise DataError for a query or a line of the file that is not as it should be.
    """

    def __init__(self, source: Source) -> None:
        self.lock = Lock()
        self._index = TreesIndex(source.trees)
        learning, self._model_folders = read_config(source.folder)
        if source.trees.name == HELDOUT_TREES:
            learning = "the tree is an evaluation's, which no step has trained"
        self._weights = StepWeights(self._index, learning)
        self._frozen = False
        self._token_texts: TokenTexts | None = None
        self._prompt_texts: list[str] = []

    def rows(self, query: Query) -> dict[str, Any]:
        """Summaries of trees from number `from` on, as columns, and the prompts that they are the first of.

        mark: what the last answer had; if its last tree has changed, the answer begins with tree 0 again.
        more: whether to ask again at once.
        """
        start, mark = number(query, "from", _LARGEST), query.get("mark", "")
        complete = self._frozen or self._index.update(_UPDATE_SECONDS)
        rows = self._index.rows
        if start > len(rows) or self._mark(start) != mark:
            start = 0
        stop = min(len(rows), start + _MOST_ROWS)
        first_prompt, last_prompt = (1 + rows["prompt"][:end].max(initial=-1).item() for end in (start, stop))
        names = [name for name in rows.dtype.names or () if name not in ("offset", "size", "hash")]
        faults = self._index.faults
        return {
            "start": start,
            "mark": self._mark(stop),
            "more": not complete or stop < len(rows),
            "bytes": [self._index.end, self._index.size],
            "columns": {name: _finite(rows[name][start:stop].tolist()) for name in names},
            "verdicts": VERDICTS,
            "prompts": [
                (prompt.id, prompt.answer) for prompt in self._index.prompts[first_prompt:last_prompt]
            ],
            "faults": {tree: faults[tree] for tree in faults if start <= tree < stop},
        }

    def prompts(self, query: Query) -> dict[str, Any]:
        """The questions of all prompts so far; their ids without a tokenizer."""
        del query
        if self._texts.missing:
            return {"questions": [prompt.id for prompt in self._index.prompts]}
        new = self._index.prompts[len(self._prompt_texts) :]
        self._prompt_texts += self._texts.decode([prompt.tokens for prompt in new])
        return {"questions": questions(self._prompt_texts)}

    def tree(self, query: Query) -> dict[str, Any]:
        """The structure of tree `tree` and what is known of its segments and leaves, but not their tokens."""
        place = number(query, "tree", len(self._index.rows))
        record, tree = self._index.tree(place)
        weights = self._weights.of(place)
        return {
            "id": tree.prompt_id,
            "answer": record.get("answer"),
            "step": record.get("step"),
            "prompt_tokens": len(tree.prompt),
            "untrained": weights if isinstance(weights, str) else None,
            "agreed": tree.agreed,
            "segments": _segments(record, tree, None if isinstance(weights, str) else weights),
            "leaves": _leaves(record),
        }

    def text(self, query: Query) -> dict[str, Any]:
        """The tokens of a node from token `from` on, with texts and log-probs, null for the prompt."""
        _, tree = self._index.tree(number(query, "tree", len(self._index.rows)))
        segment = number(query, "node", len(tree.segments) + 1) - 1
        own = tree.prompt if segment == PROMPT else tree.segments[segment].tokens
        start = number(query, "from", len(own) + 1)
        part = slice(start, start + _MOST_TOKENS)
        above = [tree.segments[index].tokens for index in tree.path(segment)[:-1]]
        context = [] if segment == PROMPT else [tree.prompt, *above]
        return {
            "tokens": own[part].tolist(),
            "texts": self._texts.texts(own[part], np.concatenate([*context, own[:start]])),
            "log_probs": None
            if segment == PROMPT
            else _finite(tree.segments[segment].log_probs[part].tolist()),
            "missing": self._texts.missing,
        }

    def exported(self, most_tokens: int) -> Iterator[tuple[str, Query]]:
        """The questions that an exported file answers: all about rows and prompts, and about the trees with
        most disagreement as many as have at most so many tokens.
        """
        with self.lock:
            self._index.update(float("inf"))
            self._frozen = True  # all answers are about the same trees
        start, mark, more = 0, "", True
        while more:
            yield "rows", {"from": str(start), "mark": mark}
            answer = self.rows({"from": str(start), "mark": mark})
            start, mark, more = start + len(answer["columns"]["step"]), answer["mark"], answer["more"]
        yield "prompts", {}
        rows = self._index.rows
        for place in np.argsort(-rows["disagreement"], kind="stable").tolist():
            most_tokens -= int(rows["unique_tokens"][place])
            if most_tokens >= 0 and place not in self._index.faults:
                yield from self._exported_tree(place)

    def _exported_tree(self, place: int) -> Iterator[tuple[str, Query]]:
        yield "tree", {"tree": str(place)}
        _, tree = self._index.tree(place)
        for node, tokens in enumerate((tree.prompt, *(segment.tokens for segment in tree.segments))):
            for start in range(0, max(len(tokens), 1), _MOST_TOKENS):
                yield "text", {"tree": str(place), "node": str(node), "from": str(start)}

    @property
    def _texts(self) -> TokenTexts:
        if self._token_texts is None:
            self._token_texts = TokenTexts(self._model_folders)
        return self._token_texts

    def _mark(self, stop: int) -> str:
        return str(self._index.rows["hash"][stop - 1]) if stop else ""


def _segments(record: Mapping[str, Any], tree: Tree, weights: np.ndarray | None) -> list[dict[str, Any]]:
    """weights: [4, S]."""
    forest = Forest.of([tree])
    batch = Batch(forest, forest.graded_L.astype(np.float64))
    with np.errstate(over="ignore"):  # rewards of a user's own function may be of any size
        value_N = batch.value_N
    cut_of = {segment: cut for cut in tree.cuts for segment in cut.segments}
    return [
        {
            "parent": segment.parent + 1,
            "tokens": len(segment.tokens),
            "finish": segment.finish,
            "draws": segment.draws,
            "cut": _cut(cut_of[node - 1]) if node - 1 in cut_of else None,
            "versions": version if isinstance(version, list) else [[version, len(segment.tokens)]],
            "log_prob": _finite(float(segment.log_probs.mean())),
            "reward": _finite(float(value_N[node])) if batch.size_N[node] else None,
            "weights": None if weights is None else _finite(weights[:, node - 1].tolist()),
        }
        for node, (segment, version) in enumerate(
            zip(tree.segments, (segment["version"] for segment in record["segments"]), strict=True), start=1
        )
    ]


def _cut(cut: Cut) -> dict[str, Any]:
    """Why the tree went on with a segment. leaf: the node of the leaf that was cut."""
    leaf = None if cut.leaf is None else cut.leaf + 1
    return {"leaf": leaf, "right": cut.right, "graded": cut.graded}


def _leaves(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """answers: those that the grader found, which an evaluation has."""
    answers = record.get("answers") or []
    return [
        {
            "node": leaf["segment"] + 1,
            "stop": leaf["stop"],
            "verdict": leaf["verdict"],
            "reward": _finite(leaf["reward"]),
            "answer": answers[place] if place < len(answers) else None,
            "values": {**leaf.get("terms", {}), **leaf.get("numbers", {}), **leaf.get("texts", {})},
        }
        for place, leaf in enumerate(record["leaves"])
    ]


def _finite(value: Any) -> Any:
    """The number, or list of numbers, with null for what JSON lacks."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if not isinstance(value, float) or isfinite(value) else None
