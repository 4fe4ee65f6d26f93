"""Finished evaluations without a model: trees with chosen verdicts, and their results documents."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.small_trees import tree_of
from treepo.config.evaluate import EvalConfig
from treepo.data.prompts import Prompt
from treepo.evaluation.folder import GradedProblem, problem_result
from treepo.evaluation.results import results_document
from treepo.rewards.grade import Grade
from treepo.tree import Tree, Verdict

COST = {
    "sessions": 1,
    "seconds": 2.0,
    "device_seconds": 4.0,
    "decoded_tokens": 100,
    "prefilled_tokens": 10,
    "cached_tokens": 5,
    "requests": 7,
    "failed_requests": 0,
    "tokens_per_second": 50.0,
    "trajectories_per_second": 3.5,
}


def config_of(out: str, samples: int, benchmarks: Sequence[str] = ("b",), **sections: Any) -> EvalConfig:
    return EvalConfig.model_validate(
        {
            "out": out,
            "model": {"path": "m"},
            "data": {"benchmarks": [{"path": f"{name}.jsonl"} for name in benchmarks]},
            "sampling": {"width": samples},
        }
        | sections
    )


def prompt_of(name: str, index: int, text: str = "1 plus 1 = ?", answer: str = "2") -> Prompt:
    """text: the question; the model's input has a system prompt before it."""
    tokens = np.array([1, 2], dtype=np.int32)
    whole = f"[system]Box it.[user]{text}"
    return Prompt(f"{name}:{index}", tokens, whole, answer, source=name, question=text)


def graded_problem(
    prompt: Prompt,
    verdicts: Sequence[Verdict],
    *,
    parents: Sequence[int] | None = None,
    text: Callable[[int], str] = lambda leaf: f"text {leaf}",
    answer: str = "7",
) -> GradedProblem:
    """A leaf for each verdict, a child of the prompt unless `parents` is given. Wrong answers differ."""
    rewards = [None if not verdict.graded else float(verdict is Verdict.CORRECT) for verdict in verdicts]
    tree = tree_of([-1] * len(verdicts) if parents is None else parents, rewards)
    graded = Tree(prompt.id, prompt.tokens, tree.segments, tree.leaves).graded(
        list(zip(rewards, verdicts, strict=True))
    )
    texts = [text(leaf) for leaf in range(len(verdicts))]
    grades = [Grade(reward, verdict, answer) for reward, verdict in zip(rewards, verdicts, strict=True)]
    classes = [0 if verdict is Verdict.CORRECT else leaf + 1 for leaf, verdict in enumerate(verdicts)]
    return GradedProblem(graded, texts, grades, classes)


def record_of(problem: GradedProblem, prompt: Prompt) -> dict[str, Any]:
    """The keys of a line of trees.jsonl besides the tree's own."""
    return {
        "answer": prompt.answer,
        "answers": [grade.answer_text for grade in problem.grades_L],
        "classes": list(problem.classes_L),
    }


def document(config: EvalConfig, benchmarks: dict[str, list[tuple[Prompt, GradedProblem]]]) -> dict[str, Any]:
    """results.json of each benchmark's problems."""
    finished = {
        name: [problem_result(record_of(problem, prompt), problem.tree) for prompt, problem in problems]
        for name, problems in benchmarks.items()
    }
    counts = {name: len(problems) for name, problems in finished.items()}
    return results_document(config.model_dump(mode="json"), True, finished, counts, {}, COST)
