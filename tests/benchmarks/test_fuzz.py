"""The fuzzers: their loop finds planted faults, and a few inputs of every fast reader find none."""

import random
from pathlib import Path

import pytest

from benchmarks.fuzz.loop import BadError, Reader, Result, fuzz
from benchmarks.fuzz.mutations import mutated
from benchmarks.fuzz.readers import READERS, open_reader
from treepo.cluster.schedulers import expand_nodelist
from treepo.errors import AllocationError, DataError

SLOW = ("metadata", "tokenizer", "model_config", "chat_template", "parquet")
FAST = sorted(set(READERS) - set(SLOW))


@pytest.mark.parametrize("name", FAST)
def test_a_few_inputs_end_in_values_or_one_line(name: str, tmp_path: Path) -> None:
    with open_reader(name) as reader:
        result = fuzz(reader, 60, 0, tmp_path, tmp_path / "running")
    assert result.failures == {}
    assert result.accepted > 0
    assert result.inputs == 60


def planted(error: BaseException | None, tmp_path: Path) -> Result:
    def read(data: bytes) -> object:
        if b"x" in data and error is not None:
            raise error
        return data

    return fuzz(Reader("planted", read, [b"a", b"x"]), 20, 0, tmp_path, tmp_path / "running")


@pytest.mark.parametrize(
    "error", [KeyError("k"), RecursionError(), SystemExit(3), BadError(), DataError(""), DataError("a\nb")]
)
def test_what_is_not_one_clear_line_is_a_failure_whose_input_is_saved(
    error: BaseException, tmp_path: Path
) -> None:
    result = planted(error, tmp_path)
    (path,) = result.failures.values()
    assert b"x" in Path(path).read_bytes()


def test_values_and_clear_errors_are_no_failures(tmp_path: Path) -> None:
    assert planted(None, tmp_path).failures == {}
    assert planted(DataError("file:3: not a number"), tmp_path).failures == {}


def test_inputs_that_reach_something_new_are_kept(tmp_path: Path) -> None:
    def read(data: bytes) -> object:
        return expand_nodelist(data.decode("latin-1"))

    reader = Reader("nodes", read, [b"a"], (b"[1-3]", b","), (AllocationError,))
    result = fuzz(reader, 400, 0, tmp_path, tmp_path / "running")
    assert result.failures == {}
    assert len(result.outcomes) > 2


def test_mutations_depend_on_the_seed_alone() -> None:
    corpus = [b'{"a": [1, 2]}\n{"b": null}', b"text"]

    def draws(seed: int) -> list[bytes]:
        draw = random.Random(seed)
        return [mutated(corpus[0], corpus, (b"word",), draw) for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)
