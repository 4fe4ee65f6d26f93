"""An index of a file with one tree a line: where each tree is, and a summary to list, filter and sort by.

The file may be larger than memory, grow while it is read, and be cut back by a run that resumes: the index
follows it, and knows by a hash which of its lines are still there. The index of a large file is kept in the
user's cache folder.
"""

import logging
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO
from zipfile import BadZipFile

import msgspec
import numpy as np
import orjson
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from treepo.errors import DataError, shortened
from treepo.tree import PROMPT, Finish, Tree, Verdict, from_json

VERDICTS = (*Verdict, None)
"""The order of the column `verdicts`; None counts answers without a verdict."""
NO_STEP = NOT_A_TREE = -1

ROW = np.dtype([
    ("offset", "<i8"),  # bytes
    ("size", "<i8"),  # bytes, with the newline
    ("hash", "<u8"),  # of the line
    ("prompt", "<i4"),  # its number in `prompts`, or NOT_A_TREE
    ("step", "<i4"),  # or NO_STEP
    ("unique_tokens", "<i8"),
    ("total_tokens", "<i8"),
    ("cuts", "<i4"),  # segments that end in a fallback cut
    ("version", "<i4"),  # the newest of the weights that sampled it
    ("reward", "<f8"),  # mean of the graded leaves; NaN without any
    ("disagreement", "<f8"),
    ("verdicts", "<i4", len(VERDICTS)),
])  # fmt: skip
"""One row a line. disagreement: the standard deviation of siblings' mean rewards, averaged over the places
where a tree branches into graded siblings.
"""

_CACHED_BYTES = 2**25  # of lines that an index in the cache saves reading, at least
_READ_BYTES = 2**20  # at once; a line is longer than the usual buffer
_PLACE = {verdict: place for place, verdict in enumerate(VERDICTS)}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class TreePrompt:
    """A prompt of the file's trees. tokens: int32 [T]."""

    id: str
    answer: str
    tokens: np.ndarray


class TreesIndex:
    """The trees of a file, which need not exist yet. Tree n is on line n + 1.

    rows: ROW [R]. faults: why a line is not a tree, by its number. size: of the file in bytes, and `end` of
    the part that is indexed.
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        """cache: a folder for indices of large files; the user's by default."""
        self.path = path
        self.rows = np.empty(0, ROW)
        self.prompts: list[TreePrompt] = []
        self.faults: dict[int, str] = {}
        self.size = 0
        self._prompt_numbers: dict[tuple[str, str, bytes], int] = {}
        name = f"trees-{xxh3_64_hexdigest(os.fsencode(path.resolve()))}.npz"
        self._cached = (cache or _cache_folder()) / name
        self._saved_bytes = 0
        self._last_read: tuple[int | None, Any] = None, None
        self._load()

    @property
    def end(self) -> int:
        return int(self.rows["offset"][-1] + self.rows["size"][-1]) if len(self.rows) else 0

    def update(self, seconds: float) -> bool:
        """Follow the file, for about `seconds`; returns whether it is indexed to the end. A last line without
        a newline is left for later. Raises OSError if the file cannot be read.
        """
        try:
            file = self.path.open("rb", buffering=_READ_BYTES)
        except FileNotFoundError:
            self.size = 0
            self._keep(0)
            return True
        with file:
            self.size = os.fstat(file.fileno()).st_size
            self._go_back(file)
            complete = self._read_on(file, monotonic() + seconds)
        if self.end - self._saved_bytes >= _CACHED_BYTES:
            self._save()
        return complete

    def tree(self, number: int) -> tuple[Mapping[str, Any], Tree]:
        """Read the record and the tree of line `number` + 1. Raises DataError if the line is not a tree."""
        place = f"{self.path}:{number + 1}"
        if not 0 <= number < len(self.rows):
            raise DataError(f"{place}: there is no such tree; the file has {len(self.rows)}")
        line_hash = int(self.rows["hash"][number])
        if self._last_read[0] == line_hash:
            return self._last_read[1]
        try:
            with self.path.open("rb") as file:
                line = self._line(file, number)
            found = orjson.loads(line), from_json(line)
            self._last_read = line_hash, found
            return found
        except OSError as error:
            raise DataError(f"{place}: {error.strerror}") from None
        except (ValueError, OverflowError) as error:
            raise DataError(f"{place}: {_reason(error)}") from None

    def _read_on(self, file: BinaryIO, deadline: float) -> bool:
        offset, complete = self.end, True
        file.seek(offset)
        rows = []
        for line in file:
            if not line.endswith(b"\n"):
                break
            rows.append(
                (offset, len(line), xxh3_64_intdigest(line), *self._row(line, len(self.rows) + len(rows)))
            )
            offset += len(line)
            if monotonic() >= deadline:
                complete = False
                break
        if rows:
            self.rows = np.concatenate([self.rows, np.array(rows, ROW)])
        return complete

    def _row(self, line: bytes, number: int) -> tuple[Any, ...]:
        """The columns of ROW after the hash."""
        try:
            record = _RECORD.decode(line)
            summary = _summary(record)
            prompt = TreePrompt(record.prompt_id, str(record.answer), np.array(record.prompt, np.int32))
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            self.faults[number] = _reason(error)
            return (NOT_A_TREE, NO_STEP, 0, 0, 0, 0, np.nan, 0.0, (0,) * len(VERDICTS))
        return (self._add_prompt(prompt), *summary)

    def _add_prompt(self, prompt: TreePrompt) -> int:
        number = len(self.prompts)
        known = self._prompt_numbers.setdefault((prompt.id, prompt.answer, prompt.tokens.tobytes()), number)
        if known == number:
            self.prompts.append(prompt)
        return known

    def _go_back(self, file: BinaryIO) -> None:
        """Forget the lines that the file no longer has."""
        number = len(self.rows)
        if number and not self._is_there(file, number - 1):
            self._keep(bisect_left(range(number), True, key=lambda row: not self._is_there(file, row)))

    def _keep(self, number: int) -> None:
        self.rows = self.rows[:number]
        self.faults = {row: reason for row, reason in self.faults.items() if row < number}
        self._saved_bytes = min(self._saved_bytes, self.end)

    def _is_there(self, file: BinaryIO, number: int) -> bool:
        return xxh3_64_intdigest(self._line(file, number)) == self.rows["hash"][number]

    def _line(self, file: BinaryIO, number: int) -> bytes:
        file.seek(int(self.rows["offset"][number]))
        return file.read(int(self.rows["size"][number]))

    def _save(self) -> None:
        """Write the index to the cache, which a disk that is full prevents."""
        texts = {
            "prompts": [(prompt.id, prompt.answer) for prompt in self.prompts],
            "faults": list(self.faults.items()),
        }
        part = self._cached.with_suffix(f".{os.getpid()}.part")
        try:
            self._cached.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez(
                    file,
                    rows=self.rows,
                    texts=np.frombuffer(orjson.dumps(texts), np.uint8),
                    tokens=np.concatenate(
                        [prompt.tokens for prompt in self.prompts] or [np.empty(0, np.int32)]
                    ),
                    lengths=np.array([len(prompt.tokens) for prompt in self.prompts], np.int64),
                )
            part.replace(self._cached)
            self._saved_bytes = self.end
        except OSError as error:
            _log.warning("%s: not written: %s", self._cached, error.strerror)
            with suppress(OSError):
                part.unlink(missing_ok=True)
            self._saved_bytes = self.end  # not at every update again

    def _load(self) -> None:
        """Read the index from the cache. One that is damaged, or of another version, is built again."""
        try:
            with np.load(self._cached, allow_pickle=False) as saved:
                rows, texts = saved["rows"], orjson.loads(saved["texts"].tobytes())
                tokens = np.split(saved["tokens"], np.cumsum(saved["lengths"])[:-1])
            if rows.dtype != ROW or rows["prompt"].max(initial=NOT_A_TREE) >= len(tokens):
                raise ValueError("another format")
            for (name, answer), prompt in zip(texts["prompts"], tokens, strict=True):
                self._add_prompt(TreePrompt(name, answer, prompt.astype(np.int32)))
            self.faults = {int(number): str(reason) for number, reason in texts["faults"]}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            _log.warning("%s: not read, the index is built again: %s", self._cached, shortened(str(error)))
            self.prompts, self.faults, self._prompt_numbers = [], {}, {}
            return
        self.rows = rows
        self._saved_bytes = self.end


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "treepo"


class _Segment(msgspec.Struct):
    parent: int
    version: int | list[tuple[int, int]]
    finish: Finish
    tokens: msgspec.Raw


class _Leaf(msgspec.Struct):
    segment: int
    reward: float | None
    verdict: Verdict | None


class _Record(msgspec.Struct):
    """What a summary needs of a line: most of it, such as the log-probs, is passed over."""

    prompt_id: str
    prompt: list[int]
    segments: list[_Segment]
    leaves: list[_Leaf]
    step: int = NO_STEP
    answer: object = ""


_RECORD = msgspec.json.Decoder(_Record)


def _summary(record: _Record) -> tuple[Any, ...]:
    """The columns of ROW from `step` on. Raises ValueError if the record is not that of a tree."""
    segments, leaves = record.segments, record.leaves
    parents = [segment.parent for segment in segments]
    lengths = [_length(segment.tokens) for segment in segments]
    depths = [*lengths, 0]  # in tokens; PROMPT is the last place
    for index, parent in enumerate(parents):
        if not PROMPT <= parent < index:
            raise ValueError(f"segment {index} has parent {parent}")
        depths[index] += depths[parent]
    verdicts = [0] * len(VERDICTS)
    for leaf in leaves:
        verdicts[_PLACE[leaf.verdict]] += 1
        if not 0 <= leaf.segment < len(segments):
            raise ValueError(f"a leaf has segment {leaf.segment}")
    reward, disagreement = _rewards(parents, [(leaf.segment, leaf.reward) for leaf in leaves])
    return (
        _int32(record.step),
        sum(lengths),
        sum(depths[leaf.segment] for leaf in leaves),
        sum(segment.finish is Finish.CUT for segment in segments),
        _int32(max((_newest(segment.version) for segment in segments), default=0)),
        reward,
        disagreement,
        tuple(verdicts),
    )


def _length(tokens: msgspec.Raw) -> int:
    """How many tokens a well-formed array has; `TreesIndex.tree` looks at what they are."""
    text = bytes(tokens)
    if text[:1] != b"[":
        raise ValueError(f"a segment has the tokens {shortened(text.decode())}")
    return text.count(b",") + 1 if len(text) > 2 else 0


def _rewards(parents: Sequence[int], leaves: Sequence[tuple[int, float | None]]) -> tuple[float, float]:
    """The mean reward and the disagreement. leaves: each one's segment and reward."""
    total, graded = [0.0] * (len(parents) + 1), [0] * (len(parents) + 1)
    for segment, reward in leaves:
        if reward is not None:
            total[segment] += reward
            graded[segment] += 1
    values_below: list[list[float]] = [[] for _ in total]
    for index in reversed(range(len(parents))):
        if graded[index]:
            parent = parents[index]
            total[parent] += total[index]
            graded[parent] += graded[index]
            values_below[parent].append(total[index] / graded[index])
    deviations = [_deviation(values) for values in values_below if len(values) > 1]
    mean = total[PROMPT] / graded[PROMPT] if graded[PROMPT] else float("nan")
    return mean, sum(deviations) / len(deviations) if deviations else 0.0


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _newest(version: int | list[tuple[int, int]]) -> int:
    return version if isinstance(version, int) else max(number for number, _ in version)


def _int32(number: int) -> int:
    if abs(number) >= 2**31:
        raise ValueError(f"a step or version is {number}")
    return number


def _reason(error: Exception) -> str:
    return f"not a tree: {shortened(str(error))}"
