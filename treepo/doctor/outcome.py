"""What a check comes to, and what all of them come to. Times are seconds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"  # there is nothing to check here, or it was not asked for


@dataclass(frozen=True, slots=True)
class Outcome:
    """found: what is there, or the reason of a skip. remedy: what to do, where it failed."""

    status: Status
    found: str
    remedy: str = ""


def passed(found: str) -> Outcome:
    return Outcome(Status.PASS, found)


def failed(found: str, remedy: str) -> Outcome:
    return Outcome(Status.FAIL, found, remedy)


def skipped(reason: str, remedy: str = "") -> Outcome:
    """remedy: where something is lost that could be had."""
    return Outcome(Status.SKIP, reason, remedy)


def verdict(good: bool, found: str, remedy: str) -> Outcome:
    """`passed` where it is good, `failed` otherwise."""
    return passed(found) if good else failed(found, remedy)


@dataclass(frozen=True, slots=True)
class Result:
    """output: the last lines of a check that crashed, hung, or failed without saying what to do."""

    name: str
    outcome: Outcome
    seconds: float
    output: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.outcome.status.value,
            "found": self.outcome.found,
            "remedy": self.outcome.remedy,
            "seconds": round(self.seconds, 3),
            "output": list(self.output),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """host: the machine's name. version: of this package; None where it is not installed as one."""

    host: str
    version: str | None
    results: Sequence[Result]

    def count(self, status: Status) -> int:
        return sum(result.outcome.status is status for result in self.results)

    @property
    def exit_code(self) -> int:
        """0 where nothing failed."""
        return 1 if self.count(Status.FAIL) else 0

    def as_json(self) -> dict[str, Any]:
        """One document: `host`, `version`, how many checks have each status, and the checks in order."""
        return {
            "host": self.host,
            "version": self.version,
            **{status.value: self.count(status) for status in Status},
            "checks": [result.as_json() for result in self.results],
        }


def as_document(outcome: Outcome) -> dict[str, str]:
    """For another process."""
    return asdict(outcome)


def from_document(document: dict[str, str]) -> Outcome:
    return Outcome(Status(document["status"]), document["found"], document["remedy"])
