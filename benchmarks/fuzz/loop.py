"""Feeds one reader with inputs, keeps those that reach something new, and saves those that it fails on.

A reader may return, or raise an error of its own with one clear line. Anything else is a failure: another
exception, more CPU seconds or memory than the bounds, an error of several lines, the end of the process.
"""

import contextlib
import hashlib
import mmap
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fuzz.coverage import Coverage
from benchmarks.fuzz.mutations import MOST_BYTES, mutated
from treepo.errors import ConfigError, TreepoError

MOST_SECONDS = 15.0
"""CPU time of one input. The slowest reader needs a few hundredths, and a chat template may have ten."""
_MOST_TEXT = 4000  # characters of a line of an error
_MOST_LINES = 25
_KEPT = 3000  # inputs of the corpus
_OURS = ("treepo", "megatron_bridge", "sglang_rollout")


class Hang(BaseException):
    """An input that takes too long; no `except Exception` stops it."""


class BadError(Exception):
    """An error that is not one clear line."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What is fuzzed. read: raises one of `refusals` for an input that is not accepted.

    seeds: valid inputs. words: that the reader looks for. share: of the inputs that were asked for, where one
    takes long. growth: most bytes by which an input may raise the peak of the process's memory.
    most_bytes: of an input, where a long one takes long and has nothing new.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    refusals: tuple[type[Exception], ...] = (TreepoError,)
    share: float = 1.0
    growth: int = 256 << 20
    most_bytes: int = MOST_BYTES


@dataclass(slots=True)
class Result:
    """What a run came to. outcomes: distinct errors, numbers and names left out.

    failures: the file of the first input of each kind.
    """

    inputs: int = 0
    seconds: float = 0.0
    accepted: int = 0
    branches: int = 0
    outcomes: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)


def fuzz(reader: Reader, inputs: int, seed: int, folder: Path, running: Path) -> Result:
    """Run `inputs` inputs, seeds first. folder: for the inputs that fail. running: a file for `current`."""
    draw = random.Random(f"{reader.name}:{seed}")
    corpus, result = list(reader.seeds), Result()
    started = time.perf_counter()
    with Coverage(_OURS) as coverage, _current(running) as note:
        for number in range(inputs):
            first = number < len(reader.seeds)
            data = reader.seeds[number] if first else mutated(draw.choice(corpus), corpus, reader.words, draw)
            data = data[: reader.most_bytes]
            note(data)
            before = coverage.found, len(result.outcomes)
            outcome = run(reader, data)
            result.inputs += 1
            result.accepted += outcome == ""
            if outcome.startswith("!"):
                _save(outcome, data, reader.name, folder, result)
            result.outcomes.add(outcome)
            if (coverage.found, len(result.outcomes)) != before and not first:
                corpus.append(data)
                if len(corpus) > _KEPT:
                    corpus.pop(draw.randrange(len(reader.seeds), len(corpus)))
    result.branches, result.seconds = coverage.found, time.perf_counter() - started
    return result


def run(reader: Reader, data: bytes) -> str:
    """Read one input: "" if it is accepted, else the kind of its error; "!" begins that of a failure."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    kind = ""
    try:
        reader.read(data)
    except reader.refusals as error:
        kind = _kind(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever else a reader lets out is a failure
        kind = f"! {_kind(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    return f"! more than {reader.growth >> 20} MiB of memory" if grown > reader.growth else kind


def _hang(*_: object) -> None:
    raise Hang(f"more than {MOST_SECONDS:g} s")


def _kind(error: BaseException) -> str:
    """Which error it is: its class and where it was raised, not what it says of this input."""
    text = str(error)
    if isinstance(error, TreepoError):
        lines = text.splitlines()
        most = _MOST_LINES if isinstance(error, ConfigError) else 1  # one for each mistake
        if not text.strip() or len(lines) > most or max(map(len, lines)) > _MOST_TEXT:
            return f"! {type(error).__name__} in {_raised_at(error)} is not one clear line"
    cause = type(error.__context__).__name__
    return f"{type(error).__name__} in {_raised_at(error)}, of {cause}"


def _raised_at(error: BaseException) -> str:
    """The last line of ours in the traceback."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if any(f"/{package}/" in name for package in _OURS):
            found = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _save(kind: str, data: bytes, name: str, folder: Path, result: Result) -> None:
    if kind not in result.failures:
        path = folder / f"{name}-{hashlib.blake2b(data, digest_size=6).hexdigest()}"
        path.write_bytes(data)
        result.failures[kind] = str(path)


@contextlib.contextmanager
def _current(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that notes an input in a file that outlives the process."""
    with path.open("wb+") as file:
        file.truncate(8 + MOST_BYTES)
        with mmap.mmap(file.fileno(), 0) as memory:

            def note(data: bytes) -> None:
                memory[: 8 + len(data)] = len(data).to_bytes(8, "little") + data

            yield note


def current(path: Path) -> bytes:
    """The input that a process which has died was reading."""
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def as_line(reader: str, result: Result) -> dict[str, Any]:
    """The JSON line of a run."""
    return {
        "reader": reader,
        "inputs": result.inputs,
        "inputs_per_second": round(result.inputs / max(result.seconds, 1e-9), 1),
        "accepted": result.accepted,
        "branches": result.branches,
        "outcomes": len(result.outcomes),
        "failures": result.failures,
    }
