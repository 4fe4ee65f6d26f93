"""Prompts from data files.

The configuration names the columns, so a publisher's file is used as it is. A row that cannot be used is an
error that names file, row and column, or it is skipped and counted by reason. A file may be larger than
memory: only the places of its usable rows are kept.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from treepo.config.data import ColumnsConfig, PromptsConfig
from treepo.data.answers import answer_of
from treepo.data.messages import messages_of, question_of, with_system_prompt
from treepo.data.prompt_order import PromptOrder, TrainingOrder
from treepo.data.row_files import open_rows
from treepo.data.rows import AbsentColumnError, BadRow, Row, RowFile, check_json, show
from treepo.data.tokenizer import Message, RefusedMessagesError, Tokenizer
from treepo.errors import DataError

_READ_AHEAD = 256  # prompts
_SKIP_HINT = "data.bad_rows: skip leaves such rows out"
_HINTS = {"no column": "{key} names the columns", "no source": "{key}.source may be null"}


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One row, ready to sample from. id: the file's name, or its name in a mixture, and the 0-based row
    ("train:17").

    text: the model's input, chat template applied. extra: for the user's own reward function. question: the
    last message of the user in it, for people to read.
    """

    id: str
    tokens: np.ndarray  # int32 [T], those of `text`
    text: str
    answer: str
    source: str
    extra: Mapping[str, object] = field(default_factory=dict)
    question: str = ""


@dataclass(slots=True)
class DataReport:
    """A file's contents in numbers. rows: all rows. duplicates: usable rows that repeat an earlier prompt.

    blank_lines: neither rows nor errors. fingerprint: of the usable rows' prompts and answers, in order.
    skipped: rows left out, by reason. examples: for each reason, the error of its first row.
    """

    path: Path
    rows: int = 0
    duplicates: int = 0
    blank_lines: int = 0
    fingerprint: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        return self.rows - self.skipped.total()

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.usable} of {self.rows} rows usable"]
        parts += [f"{count} skipped ({self.examples[reason]})" for reason, count in self.skipped.items()]
        if self.duplicates:
            parts.append(f"{self.duplicates} repeat{'s' * (self.duplicates == 1)} an earlier prompt")
        if self.blank_lines:
            parts.append(f"{self.blank_lines} blank line{'s' * (self.blank_lines != 1)}")
        return f"{self.path}: " + "; ".join(parts)


class PromptSet(Sequence[Prompt]):
    """A file's usable prompts in file order, read and tokenized on access.

    A slice (`prompts[:100]`) is a PromptSet too. Reading raises DataError if the file has changed.
    """

    def __init__(
        self, report: DataReport, rows: RowFile, places_P: np.ndarray, convert: Callable[[Row], Prompt]
    ) -> None:
        """places_P: int64 [P, 2], `index` and `at` of each usable row (treepo.data.rows.Row)."""
        self.report = report
        self._rows = rows
        self._places_P = places_P
        self._convert = convert

    def __len__(self) -> int:
        return len(self._places_P)

    @property
    def fingerprint(self) -> str:
        """Of the prompts and answers, in order."""
        return self.report.fingerprint

    def order(self, seed: int) -> TrainingOrder:
        """The order in which training takes the prompts."""
        return PromptOrder(len(self), seed)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> "PromptSet": ...

    def __getitem__(self, index: int | slice) -> "Prompt | PromptSet":
        if isinstance(index, slice):
            return PromptSet(self.report, self._rows, self._places_P[index], self._convert)
        return self.take([index])[0]

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), _READ_AHEAD):
            yield from self.take(range(start, min(start + _READ_AHEAD, len(self))))

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        """Read the prompts at `indices`, in this order; cheaper than one by one."""
        places = [(int(index), int(at)) for index, at in self._places_P[list(indices)]]
        return [self._convert(row) for row in self._rows.read(places)]


@dataclass(frozen=True, slots=True)
class _Question:
    """A row as text, before the tokenizer."""

    messages: tuple[Message, ...]
    answer: str
    source: str
    extra: Mapping[str, object]


def check_prompts(
    path: Path,
    columns: ColumnsConfig,
    config: PromptsConfig,
    *,
    key: str = "data.columns",
    extra_as_json: bool = False,
) -> DataReport:
    """Read the whole file and check every row, except what needs a tokenizer. Raises DataError.

    key: the configuration's key of `columns`, for messages. extra_as_json: whether the column `extra` must
    fit into JSON, as for a reward endpoint.
    """
    report = DataReport(path)
    rows = open_rows(path, _names(columns))
    for _ in _convert_rows(rows, columns, config, report, lambda *_: None, key, extra_as_json):
        pass
    return report


def load_prompts(
    path: Path,
    columns: ColumnsConfig,
    tokenizer: Tokenizer,
    config: PromptsConfig,
    *,
    key: str = "data.columns",
    extra_as_json: bool = False,
    name: str | None = None,
) -> PromptSet:
    """Open the file's prompts, with the limits, system prompt and treatment of bad rows of `config`.

    name: that the prompts' ids begin with; None: the file's name without its extension. Reads and tokenizes
    every row once to find the usable ones. Raises DataError.
    """

    def to_prompt(row: Row, question: _Question, render: Callable[[Sequence[Message]], str]) -> Prompt:
        messages = with_system_prompt(question.messages, config.system_prompt)
        try:
            text = render(messages)
        except RefusedMessagesError as refusal:
            raise BadRow("chat template", f"column {columns.prompt!r}: {refusal}") from refusal
        for message in messages:
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise BadRow(
                    "chat template",
                    f"column {columns.prompt!r}: the chat template leaves out the message of role "
                    f"{message['role']!r}, {show(message['content'])}",
                )
        tokens = tokenizer.encode(text)
        if len(tokens) > config.max_prompt_tokens:
            raise BadRow(
                "too long",
                f"column {columns.prompt!r} makes {len(tokens)} tokens; "
                f"data.max_prompt_tokens allows {config.max_prompt_tokens}",
            )
        return Prompt(
            id=f"{path.stem if name is None else name}:{row.index}",
            tokens=tokens,
            text=text,
            answer=question.answer,
            source=question.source,
            extra=question.extra,
            question=question_of(messages),
        )

    def place(row: Row, question: _Question) -> tuple[int, int]:
        to_prompt(row, question, tokenizer.render_bounded)
        return row.index, row.at

    report, rows = DataReport(path), open_rows(path, _names(columns))
    places = array("q")
    for pair in _convert_rows(rows, columns, config, report, place, key, extra_as_json):
        places.extend(pair)
    return PromptSet(
        report,
        rows,
        np.frombuffer(places, dtype=np.int64).reshape(-1, 2),
        lambda row: to_prompt(row, _question(row, columns, path.stem), tokenizer.render),
    )


def _names(columns: ColumnsConfig) -> frozenset[str]:
    return frozenset(filter(None, (columns.prompt, columns.answer, columns.source, columns.extra)))


def _convert_rows[T](
    rows: RowFile,
    columns: ColumnsConfig,
    config: PromptsConfig,
    report: DataReport,
    convert: Callable[[Row, _Question], T],
    key: str,
    extra_as_json: bool,
) -> Iterator[T]:
    """Yield what `convert` makes of each usable row; `report` is complete at the end.

    key: of `columns` in the configuration.
    """
    prompts = array("q")  # hashes
    digest = hashlib.blake2b(digest_size=16)
    for row in _rows_of(rows, key):
        report.rows += 1
        try:
            question = _question(row, columns, default_source=report.path.stem)
            if extra_as_json:
                check_json(question.extra, columns.extra)
            converted = convert(row, question)
        except BadRow as bad:
            if config.bad_rows == "error":
                hint = _HINTS.get(bad.reason, _SKIP_HINT).format(key=key)
                raise DataError(f"{row.place}: {bad} ({hint})") from bad
            report.skipped[bad.reason] += 1
            report.examples.setdefault(bad.reason, f"{row.place}: {bad}")
            continue
        prompts.append(hash(tuple((message["role"], message["content"]) for message in question.messages)))
        digest.update(json.dumps((row.index, question.messages, question.answer)).encode())
        yield converted
    report.duplicates = len(prompts) - len(np.unique(np.frombuffer(prompts, dtype=np.int64)))
    report.blank_lines = rows.blank_lines
    report.fingerprint = digest.hexdigest()
    if not report.usable:
        raise DataError(report.summary() if report.rows else f"{report.path}: it has no rows")


def _rows_of(rows: RowFile, key: str) -> Iterator[Row]:
    try:
        yield from rows
    except AbsentColumnError as error:
        raise DataError(f"{error} ({_HINTS['no column'].format(key=key)})") from None


def _question(row: Row, columns: ColumnsConfig, default_source: str) -> _Question:
    source = default_source if columns.source is None else row.column(columns.source)
    if not isinstance(source, str):
        raise BadRow("no source", f"column {columns.source!r} is {show(source)}; a string is needed")
    extra = {} if columns.extra is None else row.column(columns.extra)
    return _Question(
        messages=messages_of(row.column(columns.prompt), columns.prompt),
        answer=answer_of(row.column(columns.answer), columns),
        source=source,
        extra={} if extra is None else extra if isinstance(extra, Mapping) else {str(columns.extra): extra},
    )
