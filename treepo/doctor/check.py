"""What a check is, what it returns, and the report of all of them. Times are seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One check of this machine.

    function: `module:name` of a function without arguments that returns an `Outcome`. deadline: the check is
    killed after it. remedy: the advice if the check hangs, crashes, or fails without advice of its own.
    slow: skipped by --quick.
    """

    name: str
    function: str
    deadline: float
    remedy: str
    slow: bool = False


class Status(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"  # nothing to check on this machine, or left out by --quick


@dataclass(frozen=True, slots=True)
class Outcome:
    """found: the state of the machine, or the reason for a skip. remedy: what to do about a failure."""

    status: Status
    found: str
    remedy: str = ""


def passed(found: str) -> Outcome:
    return Outcome(Status.PASS, found)


def failed(found: str, remedy: str) -> Outcome:
    return Outcome(Status.FAIL, found, remedy)


def skipped(reason: str, remedy: str = "") -> Outcome:
    """remedy: given if the machine could do better."""
    return Outcome(Status.SKIP, reason, remedy)


def passed_if(good: bool, found: str, remedy: str) -> Outcome:
    return passed(found) if good else failed(found, remedy)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check's outcome, its duration, and its last lines of output if it crashed, hung, or failed without
    advice of its own.
    """

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
    """host: the machine's name. version: of this package, None if it is not installed as a package."""

    host: str
    version: str | None
    results: Sequence[CheckResult]

    def count(self, status: Status) -> int:
        return sum(result.outcome.status is status for result in self.results)

    @property
    def exit_code(self) -> int:
        """0 if nothing failed, else 1."""
        return 1 if self.count(Status.FAIL) else 0

    def as_json(self) -> dict[str, Any]:
        """One document: `host`, `version`, the number of checks with each status, and the checks in order."""
        return {
            "host": self.host,
            "version": self.version,
            **{status.value: self.count(status) for status in Status},
            "checks": [result.as_json() for result in self.results],
        }
