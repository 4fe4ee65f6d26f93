"""What a grading process sends; it receives GradeItems."""

from dataclasses import dataclass

from treepo.rewards.grade import Grade


@dataclass(frozen=True, slots=True)
class Ready:
    """The first message: the worker can grade, or `failure` is the traceback that says why not."""

    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one item. The grade of a mathematical answer has no reward yet.

    traceback: of an exception in the grader. retire: the worker has grown and should be replaced.
    """

    grade: Grade
    traceback: str | None = None
    retire: bool = False
