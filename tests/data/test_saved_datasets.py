"""Datasets as `datasets` saves them, and the schemas that publishers give to prompts and answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from tests.support.utf8_tokenizer import Utf8Tokenizer
from treepo.config.data import DataConfig
from treepo.data.prompts import PromptSet, check_prompts, load_prompts
from treepo.errors import DataError

COLUMNS = {"prompt": "prompt", "answer": "answer", "source": None}
BATCH = 3


def row(index: int) -> dict[str, Any]:
    return {"prompt": f"{index}?", "answer": str(index), "other": [index]}


def save(folder: Path, parts: list[list[dict[str, Any]]]) -> Path:
    """Write what `Dataset.save_to_disk` writes: a stream of batches for each part, a list of the files."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def config_of(path: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"train": path, "columns": COLUMNS, **settings})


def load(path: Path) -> PromptSet:
    config = config_of(path)
    return load_prompts(path, config.columns, Utf8Tokenizer(), config)


def said_of(path: Path, columns: Mapping[str, object] | None = None) -> str:
    config = config_of(path) if columns is None else config_of(path, columns=columns)
    with pytest.raises(DataError) as raised:
        check_prompts(path, config.columns, config)
    return str(raised.value)


def test_a_saved_dataset_is_read_in_order_and_by_place(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", [[row(i) for i in range(7)], [row(i) for i in range(7, 12)]])
    prompts = load(folder)
    assert [prompt.answer for prompt in prompts] == [str(index) for index in range(12)]
    assert [prompt.answer for prompt in prompts.take([11, 0, 6, 7, 0])] == ["11", "0", "6", "7", "0"]
    assert prompts[7].id == "d:7"


def test_a_saved_dataset_has_the_prompts_of_the_same_rows_in_parquet(tmp_path: Path) -> None:
    rows = [row(index) for index in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    saved, parquet = load(save(tmp_path / "d", [rows])), load(tmp_path / "d.parquet")
    assert saved.report.fingerprint == parquet.report.fingerprint
    assert [prompt.text for prompt in saved] == [prompt.text for prompt in parquet]


def test_a_bad_row_of_a_saved_dataset_is_named_by_its_file_and_row(tmp_path: Path) -> None:
    rows = [row(index) for index in range(5)]
    folder = save(tmp_path / "d", [rows, [*rows[:4], {"prompt": "?", "answer": None, "other": [1]}]])
    place = folder / "data-00001-of-00002.arrow"
    assert said_of(folder).startswith(f"{place}, row 5: column 'answer' is None; allowed")
    said = said_of(folder, COLUMNS | {"answer": "no"})
    assert said.startswith(
        f"{folder / 'data-00000-of-00002.arrow'}: column 'no' is absent; there are: prompt,"
    )
    assert said.endswith("(data.columns names the columns)")


def test_several_splits_are_named(tmp_path: Path) -> None:
    save(tmp_path / "d" / "train", [[row(0)]])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert said_of(tmp_path / "d").endswith("with the splits train, test; name the folder of one of them")
    assert len(load(tmp_path / "d" / "train")) == 1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "state.json: it cannot be read as JSON"),
        ("[]", "state.json: a JSON object is needed, not list"),
        ("{}", "it names None, which is no file of the folder"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "it names '../x.arrow', which is no file"),
        ('{"_data_files": [{"filename": "absent.arrow"}]}', "it names 'absent.arrow', which is no file"),
        ('{"_indices_data_files": [{}]}', "save it after flatten_indices()"),
    ],
)
def test_a_folder_that_is_not_as_saved(tmp_path: Path, state: str, said: str) -> None:
    folder = save(tmp_path / "d", [[row(0)]])
    (tmp_path / "x.arrow").write_bytes(b"")
    (folder / "state.json").write_text(state)
    assert said in said_of(folder)


@pytest.mark.parametrize("end", [0, 10, -100])
def test_a_damaged_file_is_one_line(tmp_path: Path, end: int) -> None:
    folder = save(tmp_path / "d", [[row(index) for index in range(9)]])
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:end])
    said = said_of(folder)
    assert said.startswith(f"{file}: it cannot be read as Arrow: ")
    assert "\n" not in said


def test_a_file_that_changes_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", [[row(0), row(1)]])
    prompts = load(folder)
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DataError, match="it has changed while it was in use"):
        prompts.take([0])


def parquet(path: Path, **values: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "?", "answer": "7"} | values]), path)
    return path


@pytest.mark.parametrize(
    "answer",
    [
        {"ground_truth": "7", "style": "rule"},
        {"ground_truth": ["6", "7"], "style": "rule"},
        {"value": 7, "note": None},
        {"target": 7.0},
        [{"answer": "6"}, {"answer": "7"}],
        [6, 7],
        7,
        7.0,
    ],
)
def test_an_answer_is_an_object_a_list_or_a_number(tmp_path: Path, answer: object) -> None:
    assert load(parquet(tmp_path / "d.parquet", answer=answer))[0].answer == "7"
    assert load(save(tmp_path / "d", [[{"prompt": "?", "answer": answer}]]))[0].answer == "7"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"first": 1, "second": 2}, "is an object with first, second; name one of them, as answer.first"),
        ({"answer": 1, "value": 2}, "is an object with answer, value; name one of them, as answer.answer"),
        ({"value": True}, "is {'value': True}; allowed"),
    ],
)
def test_an_answer_that_is_not_clear_is_no_answer(tmp_path: Path, answer: object, said: str) -> None:
    assert f"d.parquet, row 1: column 'answer' {said}" in said_of(
        parquet(tmp_path / "d.parquet", answer=answer)
    )


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "system", "content": "Think."}, {"role": "user", "content": "7?"}],
        [{"role": "user", "content": [{"type": "text", "text": "7?"}], "tool_calls": None}],
    ],
)
def test_the_question_is_the_users_last_message(tmp_path: Path, prompt: object) -> None:
    [found] = load(parquet(tmp_path / "d.parquet", prompt=prompt))
    assert found.question == "7?"
    assert found.text.endswith("[user]7?")
