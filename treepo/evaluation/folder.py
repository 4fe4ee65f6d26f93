# ruff: noqa: N815 - the suffix names the dimension (CONTRIBUTING.md)
"""The files of an evaluation, and how it resumes after a kill.

    config.yaml      the effective configuration
    samples.jsonl    one line a response: text, verdict, extracted answer, tokens, stop reason
    trees.jsonl      one line a problem (treepo.tree.to_json), with verdicts, votes, and the cost so far
    results.json     every number, with all settings
    report.html      the same as a page, with every problem
    accuracy.svg     accuracy against compute
    log.txt          the log

A problem is finished once its line in trees.jsonl is complete; its samples are written before. Opening the
folder of a killed evaluation drops everything that belongs to unfinished problems.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NotRequired, Self, TypedDict

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError

from treepo.config.dotted import by_dotted_key
from treepo.config.evaluate import EvalConfig
from treepo.config.load import load_as
from treepo.data.output_folder import CONFIG, LOG, TREES, GrowingFile, log_to, prepare_folder
from treepo.data.prompts import Prompt
from treepo.errors import ConfigError, DataError, shortened
from treepo.evaluation.metrics import ProblemResult
from treepo.learning.advantage import inverse_branching
from treepo.learning.forest import Forest
from treepo.rewards.grade import Grade
from treepo.tree import Tree, from_json, to_json

SAMPLES, REPORT, PLOT = "samples.jsonl", "report.html", "accuracy.svg"
_MAY_CHANGE = ("out", "engine.", "reward.workers")  # prefixes of the keys that no number depends on
_PART = ".part"  # the suffix of a file that is being written


@dataclass(frozen=True, slots=True)
class SessionCost:
    """The cost so far of one session, a process that sampled. engines: the number that it held."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    session: int
    engines: int
    seconds: float
    decoded_tokens: int
    prefilled_tokens: int
    cached_tokens: int
    requests: int
    failed_requests: int


class _Keys(TypedDict):
    """The keys of a line of trees.jsonl besides the tree's own."""

    model: str
    answer: str
    answers: list[str | None]
    classes: list[int]
    spent: SessionCost
    question: NotRequired[str]  # absent from the files of earlier versions


_KEYS = TypeAdapter(_Keys)


@dataclass(frozen=True, slots=True, eq=False)
class GradedProblem:
    """One problem's graded tree. texts_L, grades_L, classes_L: one for each of the tree's leaves, in order.

    classes_L: as in `ProblemResult`.
    """

    tree: Tree
    texts_L: Sequence[str]
    grades_L: Sequence[Grade]
    classes_L: Sequence[int]


class EvaluationFolder:
    """A context manager that appends finished problems to the files.

    results: of the finished problems, by id. spent: the cost of each session when it finished its last
    problem.
    """

    def __init__(
        self, config: EvalConfig, prompts: Mapping[str, Prompt], model: str, *, anew: bool = False
    ) -> None:
        """Open the folder and recover its finished problems.

        model: a fingerprint of the weights, independent of their path. anew: move the files of an earlier
        evaluation into `previous-N/` and start over. Without it, raises ConfigError if they are of another
        evaluation. Raises ConfigError for a folder of anything else.
        """
        self.path = config.out
        self.results: dict[str, ProblemResult] = {}
        self.spent: dict[int, SessionCost] = {}
        self._prompts = prompts
        self._model = model
        if anew or not (config.out / CONFIG).is_file():
            prepare_folder(config.out, config)
        else:
            _check_same(config)
            self._recover()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._trees = self._stack.enter_context(GrowingFile(self.path / TREES))
        self._samples = self._stack.enter_context(GrowingFile(self.path / SAMPLES))
        self._stack.enter_context(log_to(self.path / LOG))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, problem: GradedProblem, spent: SessionCost) -> ProblemResult:
        """Write a finished problem: its samples, then its tree."""
        prompt = self._prompts[problem.tree.prompt_id]
        self._samples.write("".join(_sample_lines(problem, prompt)).encode())
        line = to_json(
            problem.tree,
            model=self._model,
            question=_unicode(prompt.question),
            answer=_unicode(prompt.answer),
            answers=[
                None if grade.answer_text is None else _unicode(grade.answer_text)
                for grade in problem.grades_L
            ],
            classes=list(problem.classes_L),
            spent=asdict(spent),
        )
        self._trees.write(line)
        self._add(orjson.loads(line), problem.tree)
        return self.results[prompt.id]

    def problems(self) -> Iterator[tuple[Mapping[str, Any], Tree]]:
        """The record and the tree of every finished problem, in the order in which they were finished."""
        with (self.path / TREES).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _parse_tree(line, f"{self.path / TREES}:{number}")

    def _add(self, record: Mapping[str, Any], tree: Tree) -> None:
        self.results[tree.prompt_id] = problem_result(record, tree)
        spent = SessionCost(**record["spent"])  # `_parse_tree` has checked it, if it was read
        self.spent[spent.session] = spent

    def _recover(self) -> None:
        trees, samples = self.path / TREES, self.path / SAMPLES
        for path in (trees, samples):
            path.touch()
            _drop_incomplete_line(path)
        for record, tree in self.problems():
            prompt, name = self._prompts.get(tree.prompt_id), shortened(tree.prompt_id)
            if (
                prompt is None
                or prompt.tokens.tobytes() != tree.prompt.tobytes()
                or _unicode(prompt.answer) != record["answer"]
            ):
                raise ConfigError(
                    f"out: {trees} has problem {name} with another prompt or answer than the data "
                    "file has now; --force starts over"
                )
            if record["model"] != self._model:
                raise ConfigError(
                    f"out: {self.path} holds an evaluation of other weights than the model has now; --force "
                    "starts over and sets its files aside"
                )
            if tree.prompt_id in self.results:
                raise DataError(f"{trees}: problem {name} is in it twice; --force starts over")
            self._add(record, tree)
        self._drop_unfinished(samples)

    def _drop_unfinished(self, samples: Path) -> None:
        """Keep only the samples of finished problems. Raises DataError if one of these lacks some."""
        kept: Counter[str] = Counter()
        part = samples.with_name(f"{SAMPLES}{_PART}")
        with samples.open("rb") as file, part.open("wb") as finished:
            for number, line in enumerate(file, start=1):
                name = _parse_problem_id(line, f"{samples}:{number}")
                if name in self.results:
                    finished.write(line)
                    kept[name] += 1
        for name, result in self.results.items():
            if kept[name] != len(result.verdicts_L):
                raise DataError(
                    f"{samples}: {kept[name]} lines of problem {name}, which has {len(result.verdicts_L)} "
                    f"responses in {TREES}; --force starts over"
                )
        part.replace(samples)


def problem_result(record: Mapping[str, Any], tree: Tree) -> ProblemResult:
    """What the metrics need, from a line of trees.jsonl."""
    forest = Forest.of([tree])
    return ProblemResult(
        benchmark=tree.prompt_id.rpartition(":")[0],
        id=tree.prompt_id,
        answer=record["answer"],
        verdicts_L=tuple(leaf.verdict for leaf in tree.leaves if leaf.verdict is not None),
        classes_L=tuple(record["classes"]),
        weights_L=tuple(inverse_branching(forest).tolist()),
        tokens_L=tuple(forest.response_tokens_L.tolist()),
        stops_L=tuple(leaf.stop for leaf in tree.leaves),
        unique_tokens=tree.unique_tokens(),
    )


def _sample_lines(problem: GradedProblem, prompt: Prompt) -> Iterator[str]:
    """ASCII only, so that whatever text a model writes is one valid line."""
    tokens_L = Forest.of([problem.tree]).response_tokens_L.tolist()
    for index, (leaf, text, grade, number, tokens) in enumerate(
        zip(
            problem.tree.leaves,
            problem.texts_L,
            problem.grades_L,
            problem.classes_L,
            tokens_L,
            strict=True,
        )
    ):
        sample = {
            "problem": prompt.id,
            "sample": index,
            "verdict": grade.verdict,
            "answer": grade.answer_text,
            "gold": prompt.answer,
            "vote": number,
            "reward": grade.reward,
            "terms": dict(grade.terms),
            "texts": dict(grade.texts),
            "message": grade.message,
            "tokens": tokens,
            "stop": leaf.stop,
            "text": text,
        }
        yield json.dumps(sample) + "\n"


def _parse_tree(line: bytes, place: str) -> tuple[dict[str, Any], Tree]:
    try:
        record, tree = orjson.loads(line), from_json(line)
        _KEYS.validate_json(line, strict=True)
        if len(record["classes"]) != len(tree.leaves):
            raise ValueError(f"{len(record['classes'])} classes for {len(tree.leaves)} leaves")
        return record, tree
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _foreign_line(place, error) from None


def _parse_problem_id(line: bytes, place: str) -> str:
    try:  # not orjson, which refuses the lone surrogates that a model's text may have
        problem = json.loads(line)["problem"]
        if not isinstance(problem, str):
            raise TypeError(f"problem {problem!r}")
        return problem
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign_line(place, error) from None


def _foreign_line(place: str, error: Exception) -> DataError:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    else:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{place}: not a line of an evaluation: {shortened(reason)}; --force starts over")


def _unicode(text: str) -> str:
    """`text` with each lone surrogate replaced by a question mark: orjson cannot write them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _drop_incomplete_line(path: Path) -> None:
    """Drop what follows the last newline: a killed process may have written half a line."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 2**20, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _check_same(config: EvalConfig) -> None:
    """Raise ConfigError if the folder's evaluation was configured differently, naming the first key."""
    path = config.out / CONFIG
    try:
        before = load_as(EvalConfig, path)
    except ConfigError:
        raise ConfigError(
            f"out: {config.out} holds no evaluation that this version can resume; --force starts over and "
            "sets its files aside"
        ) from None
    was, now = (by_dotted_key(settings.model_dump(mode="json")) for settings in (before, config))
    for key in dict.fromkeys([*now, *was]):
        if was.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
            raise ConfigError(
                f"out: {config.out} holds an evaluation with {key} = {was.get(key)}, not {now.get(key)}; "
                "--force starts over and sets its files aside"
            )
