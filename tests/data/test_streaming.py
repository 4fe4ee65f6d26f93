"""Prompts of a file larger than memory: the parts that are kept, the reads, and equal prompts from both."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_prompts import PLAIN, configure
from tests.support.utf8_tokenizer import Utf8Tokenizer
from treepo.data import parquet_rows
from treepo.data.prompts import PromptSet, load_prompts
from treepo.errors import DataError

ROWS, TEXT_BYTES, GROUP_ROWS = 3000, 4000, 250
FILE_BYTES = ROWS * TEXT_BYTES
# Never freed: Arrow's buffers outlive the test and return to their pool.
COUNTING_POOL = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())


def question(index: int) -> str:
    """About TEXT_BYTES of text that does not compress."""
    rng = np.random.default_rng(index)
    return f"{index}: {rng.bytes(TEXT_BYTES // 2).hex()}"


def generate() -> Iterator[dict[str, object]]:
    for index in range(ROWS):
        # Every tenth row has no answer, every hundredth repeats the first row's prompt.
        text = question(0 if index % 100 == 5 else index)
        yield {"question": text, "answer": None if index % 10 == 0 and index else index, "more": [index]}


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "large.jsonl"
    with path.open("w") as file:
        for index, row in enumerate(generate()):
            file.write(json.dumps(row) + "\n" + "\n" * (index % 7 == 0))
    return path


@pytest.fixture(scope="module")
def parquet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "large.parquet"
    table = pyarrow.Table.from_pylist(list(generate()))
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP_ROWS)
    return path


@pytest.fixture(params=["json_file", "parquet_file"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def load(path: Path) -> PromptSet:
    config = configure(path, PLAIN | {"extra": "more"}, max_prompt_tokens=2 * TEXT_BYTES, bad_rows="skip")
    return load_prompts(path, config.columns, Utf8Tokenizer(), config)


def test_the_report_counts_everything(path: Path) -> None:
    report = load(path).report
    assert (report.rows, report.usable, report.duplicates) == (ROWS, ROWS - 299, ROWS // 100)
    assert report.blank_lines == (-(-ROWS // 7) if path.suffix == ".jsonl" else 0)
    assert ("429 blank lines" in report.summary()) == (path.suffix == ".jsonl")


def test_by_place_in_order_and_in_parts_are_the_same_prompts(path: Path) -> None:
    prompts = load(path)
    usable = [index for index in range(ROWS) if index % 10 or index == 0]
    assert [prompt.id for prompt in prompts] == [f"large:{index}" for index in usable]
    drawn = np.random.default_rng(0).integers(0, len(prompts), 50).tolist()
    for at, prompt in zip(drawn, prompts.take(drawn), strict=True):
        index = usable[at]
        text = question(0 if index % 100 == 5 else index)
        assert prompt.text == f"[user]{text}"
        assert prompt.tokens.tolist() == list(prompt.text.encode())
        assert (prompt.id, prompt.answer, prompt.extra) == (f"large:{index}", str(index), {"more": [index]})
    part = prompts[10:2000:3]
    assert isinstance(part, PromptSet)
    assert [prompt.id for prompt in part] == [f"large:{index}" for index in usable[10:2000:3]]
    assert part[-1].id == prompts[10 + 3 * (len(part) - 1)].id
    assert len(prompts[:0]) == 0
    with pytest.raises(IndexError):
        prompts[len(prompts)]


def test_of_json_lines_two_integers_a_row_are_kept(json_file: Path) -> None:
    """Counted, not measured by the clock or by RSS. 16 bytes a row, which a growing array may overshoot."""
    load(json_file)[0]  # so that allocations of the first use do not count
    tracemalloc.start()
    try:
        prompts = load(json_file)
        kept, most = tracemalloc.get_traced_memory()
        assert kept < 32 * ROWS + 50_000
        assert most < FILE_BYTES / 20  # a few rows at once
        tracemalloc.reset_peak()
        prompts.take(range(0, len(prompts), len(prompts) // 16))
        _, most = tracemalloc.get_traced_memory()
        # 17 prompts: their text, four bytes of tokens for each byte of it, and some copies on the way.
        assert most < 17 * TEXT_BYTES * 16
    finally:
        tracemalloc.stop()


def test_of_parquet_some_row_groups_are_kept(parquet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group_bytes = GROUP_ROWS * TEXT_BYTES
    monkeypatch.setattr(parquet_rows, "_KEPT_BYTES", 3 * group_bytes)
    monkeypatch.setattr(parquet_rows, "_BATCH_ROWS", GROUP_ROWS // 2)
    pool, before = COUNTING_POOL, pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        prompts = load(parquet_file)
        # A compressed group, its decoded part, and Arrow's read-ahead; the file has twelve groups.
        assert pool.max_memory() < 3 * group_bytes
        for prompt in prompts.take(np.random.default_rng(1).permutation(len(prompts))[:200].tolist()):
            assert prompt.answer == prompt.id.partition(":")[2]
        assert pool.bytes_allocated() < 4 * group_bytes
        assert pool.max_memory() < 5 * group_bytes  # the kept groups, and the next one while it is read
    finally:
        pyarrow.set_memory_pool(before)


def test_one_call_reads_each_row_group_once(parquet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "_KEPT_BYTES", 0)  # keep only the group in use
    prompts = load(parquet_file)
    read: list[int] = []
    original = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self: pyarrow.parquet.ParquetFile, number: int, columns: list[str]) -> object:
        read.append(number)
        return original(self, number, columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    prompts.take(np.random.default_rng(2).permutation(len(prompts))[:500].tolist())
    assert sorted(read) == list(range(ROWS // GROUP_ROWS))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_changes_in_use_is_an_error(tmp_path: Path, suffix: str, gone: bool) -> None:
    path = tmp_path / f"data{suffix}"

    def write(count: int) -> None:
        content = [{"question": f"{index}?", "answer": index, "more": []} for index in range(count)]
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)

    write(3)
    prompts = load(path)
    assert prompts[1].answer == "1"
    path.unlink() if gone else write(4)
    with pytest.raises(DataError, match=f"{path}: it has changed while it was in use"):
        prompts[1]
