"""Prompts from files: formats, columns, answers of every kind, errors for bad rows, and the order."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

import treepo
from tests.support.utf8_tokenizer import Utf8Tokenizer
from treepo.config.data import ColumnsConfig, DataConfig, PromptsConfig
from treepo.data.prompts import check_prompts, load_prompts
from treepo.data.tokenizer import Message, RefusedMessagesError
from treepo.errors import DataError

PLAIN = {"prompt": "question", "answer": "answer", "source": None}


class NoSystemTokenizer(Utf8Tokenizer):
    """Its chat template takes no system message."""

    def render(self, messages: Sequence[Message]) -> str:
        if messages[0]["role"] == "system":
            raise RefusedMessagesError(
                "the chat template refuses the messages (system, user): no system role"
            )
        return super().render(messages)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(path: Path, columns: Mapping[str, object] | str = PLAIN, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"train": path, "columns": columns, **settings})


def answers(path: Path, **columns: object) -> list[str]:
    config = configure(path, PLAIN | columns)
    return [prompt.answer for prompt in load_prompts(path, config.columns, Utf8Tokenizer(), config)]


def treepo_row(index: int) -> dict[str, Any]:
    return {
        "data_source": "math",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"{index}?"}],
        "reward_model": {"ground_truth": str(index), "style": "rule"},
        "extra_info": {"index": index},
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_treepo_datas_own_columns(tmp_path: Path, suffix: str) -> None:
    path, rows = tmp_path / f"train{suffix}", [treepo_row(index) for index in range(3)]
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = configure(path, {"extra": "extra_info"})
    prompts = load_prompts(path, config.columns, Utf8Tokenizer(), config)
    assert [prompt.id for prompt in prompts] == ["train:0", "train:1", "train:2"]
    assert prompts[1].text == "[system]Think.[user]1?"
    assert prompts[1].tokens.tolist() == list(prompts[1].text.encode())
    assert (prompts[1].answer, prompts[1].source, prompts[1].extra) == ("1", "math", {"index": 1})
    assert len(prompts[:2]) == 2


def test_text_becomes_a_users_message_and_the_system_prompt_comes_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "1+1?", "answer": 2}])
    config = configure(path, system_prompt="Box it.")
    [prompt] = load_prompts(path, config.columns, Utf8Tokenizer(), config)
    assert prompt.text == "[system]Box it.[user]1+1?"
    assert prompt.source == "data"


def test_the_system_prompt_replaces_the_rows_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [treepo_row(0)])
    config = configure(path, {}, system_prompt="Box it.")
    [prompt] = load_prompts(path, config.columns, Utf8Tokenizer(), config)
    assert prompt.text == "[system]Box it.[user]0?"


def test_messages_that_the_chat_template_refuses_are_a_bad_row(tmp_path: Path) -> None:
    user = {"question": "2?", "answer": 2}
    system = {
        "question": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1?"}],
        "answer": 1,
    }
    path = write_jsonl(tmp_path / "data.jsonl", [user, system])
    said = r"column 'question': the chat template refuses the messages \(system, user\): no system role"
    config = configure(path)
    with pytest.raises(DataError, match=f"{path}:2: {said}"):
        load_prompts(path, config.columns, NoSystemTokenizer(), config)
    config = configure(path, bad_rows="skip")
    prompts = load_prompts(path, config.columns, NoSystemTokenizer(), config)
    assert [prompt.id for prompt in prompts] == ["data:0"]
    assert prompts.report.skipped == {"chat template": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" 7 ", "7"),
        (7, "7"),
        (-7, "-7"),
        (27.0, "27"),
        (2.5, "2.5"),
        (10**40, str(10**40)),
        (["1", "2"], "2"),
        ([1, 2.0], "2"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_answers_of_every_kind(tmp_path: Path, value: object, expected: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "?", "answer": value}])
    assert answers(path) == [expected]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(Decimal("12.50"), "12.50"), (Decimal("1E+3"), "1000"), (np.int64(7), "7"), ([1.0, 2.5], "2.5")],
)
def test_answers_of_parquets_own_kinds(tmp_path: Path, value: object, expected: str) -> None:
    path = tmp_path / "data.parquet"
    table = pyarrow.table({"question": ["?"], "answer": pyarrow.array([value])})
    pyarrow.parquet.write_table(table, path)
    assert answers(path) == [expected]


def test_an_answer_within_a_solution(tmp_path: Path) -> None:
    solution = r"#### 1 \boxed{\frac{1}{2}} #### 3"
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "?", "answer": solution}])
    assert answers(path, answer_after="#### ") == ["3"]
    assert answers(path, answer_boxed=True) == [r"\frac{1}{2}"]


def test_nested_columns_and_columns_with_a_dot(tmp_path: Path) -> None:
    row = {"a": {"b": {"c": "nested"}}, "d.e": "dotted", "question": "?"}
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    assert answers(path, answer="a.b.c") == ["nested"]
    assert answers(path, answer="d.e") == ["dotted"]


BAD_ROWS = {
    "no column": ('{"question": "?"}', "column 'answer' is absent; there are: question"),
    "not JSON": ('{"question": ', "not JSON"),
    "no object": ("[1, 2]", "a JSON object is needed, not list"),
    "not UTF-8": (b'{"question": "\xff", "answer": 1}', "not UTF-8 text: byte 15 of the line is 0xff"),
    "endless nesting": ("[" * 100_000, "not JSON"),
    "no answer": ('{"question": "?", "answer": null}', "column 'answer' is None; allowed: text"),
    "empty answer": ('{"question": "?", "answer": " "}', "column 'answer' is ' '"),
    "no answer in the list": ('{"question": "?", "answer": []}', "column 'answer' is []"),
    "true": ('{"question": "?", "answer": true}', "column 'answer' is True"),
    "infinite": ('{"question": "?", "answer": 1e999}', "column 'answer' is inf"),
    "not a number": ('{"question": "?", "answer": NaN}', "column 'answer' is nan"),
    "an object": ('{"question": "?", "answer": {"a": 1}}', "column 'answer' is an object with a; name"),
    "no prompt": ('{"question": null, "answer": 1}', "column 'question' is None; allowed: text, or"),
    "empty prompt": ('{"question": "\\n", "answer": 1}', "column 'question' is '\\n'"),
    "no messages": ('{"question": [], "answer": 1}', "column 'question' is []"),
    "no content": (
        '{"question": [{"role": "user"}], "answer": 1}',
        "column 'question', message 1 is {'role': 'user'}; allowed",
    ),
    "messages of text": ('{"question": ["?"], "answer": 1}', "column 'question', message 1 is '?'"),
    "too long": (
        json.dumps({"question": "?" * 100, "answer": 1}),
        "column 'question' makes 106 tokens; data.max_prompt_tokens allows 50",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    bad, said = BAD_ROWS[kind]
    line = bad if isinstance(bad, bytes) else bad.encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"question": "a?", "answer": 1}\n\n' + line + b'\n{"question": "b?", "answer": 2}')
    strict = configure(path, max_prompt_tokens=50)
    with pytest.raises(DataError) as raised:
        load_prompts(path, strict.columns, Utf8Tokenizer(), strict)
    assert f"{path}:3: {said}" in str(raised.value)  # line 3: the blank one counts here
    assert "\n" not in str(raised.value)
    if kind != "too long":  # only a tokenizer can tell
        with pytest.raises(DataError):
            check_prompts(path, strict.columns, strict)

    lenient = configure(path, max_prompt_tokens=50, bad_rows="skip")
    prompts = load_prompts(path, lenient.columns, Utf8Tokenizer(), lenient)
    assert [prompt.id for prompt in prompts] == ["data:0", "data:2"]
    assert (prompts.report.rows, prompts.report.usable, prompts.report.skipped.total()) == (3, 2, 1)
    assert said in prompts.report.summary()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"answer_after": "#### "}, "column 'answer' is '7' without '#### ' in it"),
        ({"answer_boxed": True}, r"column 'answer' is '7' without a complete \boxed{...} in it"),
        ({"source": "answer_type"}, "column 'answer_type' is absent"),
        ({"source": "number"}, "column 'number' is 3; a string is needed"),
        ({"extra": "more"}, "column 'more' is absent"),
        ({"answer": "answer.value"}, "column 'answer' is text, '7'; 'answer.value' needs an object there"),
        ({"source": "nested.other"}, "column 'nested' has no 'other'; there are: value"),
    ],
)
def test_a_column_that_does_not_hold_what_it_should(
    tmp_path: Path, columns: dict[str, object], said: str
) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"question": "?", "answer": "7", "number": 3, "nested": {"value": 1}}]
    )
    config = configure(path, PLAIN | columns)
    with pytest.raises(DataError) as raised:
        check_prompts(path, config.columns, config)
    assert f"{path}:1: {said}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.jsonl", None, "no such file"),
        ("data.csv", b"question,answer", "must end in .jsonl or .parquet, not '.csv'"),
        ("empty.jsonl", b"\n\n", "it has no rows"),
        ("data.parquet", b"not parquet", "cannot be read as parquet"),
    ],
)
def test_a_bad_file(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    config = configure(path, bad_rows="skip")
    with pytest.raises(DataError, match=f"{path}.*{said}"):
        check_prompts(path, config.columns, config)


def test_no_usable_row_is_an_error_even_when_bad_ones_are_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "?"}] * 3)
    config = configure(path, bad_rows="skip")
    with pytest.raises(DataError, match=r"0 of 3 rows usable; 3 skipped .*column 'answer' is absent"):
        check_prompts(path, config.columns, config)


def test_a_bad_parquet_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = [{"question": f"{i}?", "answer": None if i == 1500 else "1"} for i in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = configure(path)
    with pytest.raises(DataError, match=f"{path}, row 1501: column 'answer' is None"):
        check_prompts(path, config.columns, config)
    config = configure(path, PLAIN | {"answer": "solution.text"})
    with pytest.raises(DataError, match=r"column 'solution.text' is absent; there are: question, answer"):
        check_prompts(path, config.columns, config)


def test_repeated_prompts_are_counted(tmp_path: Path) -> None:
    rows = [{"question": f"{i % 3}?", "answer": i} for i in range(5)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    config = configure(path)
    report = check_prompts(path, config.columns, config)
    assert (report.rows, report.duplicates) == (5, 2)
    assert "2 repeat an earlier prompt" in report.summary()


def test_two_ways_to_an_answer_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="answer_after = '#### ' and answer_boxed = true are two ways"):
        ColumnsConfig(answer_after="#### ", answer_boxed=True)


def test_every_shipped_map_of_columns_is_valid(tmp_path: Path) -> None:
    shipped = Path(treepo.__path__[0]) / "data/columns"
    names = [path.stem for path in shipped.iterdir()]
    assert "gsm8k" in names
    for name in names:
        assert configure(tmp_path, name).columns != ColumnsConfig()


def test_an_unknown_name_for_columns_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"should be one of .*, found 'gsm9k'; did you mean 'gsm8k'"):
        configure(tmp_path, "gsm9k")


def test_the_fingerprint_is_of_prompts_answers_and_their_order(tmp_path: Path) -> None:
    rows = [{"q": f"{i} + 1?", "a": i + 1, "other": i} for i in range(4)]
    columns = ColumnsConfig(prompt="q", answer="a", source=None)

    def fingerprint(rows: list[dict[str, Any]]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check_prompts(path, columns, PromptsConfig()).fingerprint

    same = fingerprint(rows)
    assert fingerprint([row | {"other": 9} for row in rows]) == same
    for changed in (rows[:3], rows[::-1], [rows[0] | {"a": 7}, *rows[1:]], [rows[0] | {"q": "?"}, *rows[1:]]):
        assert fingerprint(changed) != same


def test_the_columns_of_train_are_those_of_the_heldout_file_unless_it_has_its_own(tmp_path: Path) -> None:
    config = configure(tmp_path, "gsm8k")
    assert config.heldout_columns == config.columns != ColumnsConfig()
    own = configure(tmp_path, "gsm8k", heldout_columns={"prompt": "p"}).heldout_columns
    assert own == ColumnsConfig(prompt="p")
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    assert DataConfig.model_validate({"train": tmp_path}).heldout_columns == ColumnsConfig()
    with pytest.raises(ValidationError, match="1 validation error"):
        configure(tmp_path, {"prompt": 5})


@pytest.mark.parametrize("parquet", [False, True])
def test_an_error_about_columns_names_the_key_that_they_are_from(tmp_path: Path, parquet: bool) -> None:
    rows = [{"question": "?", "number": 1, "answer": 1}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    if parquet:
        path = tmp_path / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    key = "data.heldout_columns"
    for columns, said in (
        ({"answer": "no"}, f"{key} names the"),
        ({"source": "number"}, f"{key}.source may"),
    ):
        config = configure(path, PLAIN | columns)
        with pytest.raises(DataError, match=said):
            check_prompts(path, config.columns, config, key=key)
        with pytest.raises(DataError, match=said):
            load_prompts(path, config.columns, Utf8Tokenizer(), config, key=key)
