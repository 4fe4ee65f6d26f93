"""Rows as other tools write them: each gives its value, or one line with file, row and column."""

import gzip
import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_prompts import PLAIN, configure, write_jsonl
from tests.data.test_tokenizer import write_folder
from tests.support.paths import ROOT
from tests.support.utf8_tokenizer import Utf8Tokenizer
from treepo.data import row_files
from treepo.data import tokenizer as data_tokenizer
from treepo.data.prompts import Prompt, check_prompts, load_prompts
from treepo.data.tokenizer import Message, Tokenizer, load_tokenizer
from treepo.errors import DataError, TreepoError

GOOD = {"question": "2+3?", "answer": "5"}
USER = {"role": "user", "content": "2+3?"}


def load(path: Path, tokenizer: Tokenizer | None = None, **columns: object) -> list[Prompt]:
    config = configure(path, PLAIN | columns)
    return list(load_prompts(path, config.columns, tokenizer or Utf8Tokenizer(), config))


def text_of(tmp_path: Path, question: object) -> str:
    [prompt] = load(write_jsonl(tmp_path / "data.jsonl", [GOOD | {"question": question}]))
    return prompt.text


def error_of(path: Path, *, skip: bool = True, **columns: object) -> str:
    """The one line with which the file is refused without a tokenizer; a bad row of two can be skipped."""
    config = configure(path, PLAIN | columns)
    with pytest.raises(DataError) as raised:
        check_prompts(path, config.columns, config, extra_as_json=True)
    assert "\n" not in str(raised.value)
    str(raised.value).encode()  # can be written to a log
    if skip:
        lenient = configure(path, PLAIN | columns, bad_rows="skip")
        report = check_prompts(path, lenient.columns, lenient, extra_as_json=True)
        assert (report.rows, report.usable) == (2, 1)
    return str(raised.value)


@pytest.mark.parametrize(
    "question",
    [
        json.dumps([USER]),
        json.dumps([USER], indent=2),
        json.dumps([{"name": "Ann", "id": 5} | USER]),
        json.dumps(json.dumps([USER])),
        [USER | {"content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]}],
        [USER | {"name": None, "tool_calls": None}],
    ],
)
def test_messages_in_other_forms_are_the_same_prompt(tmp_path: Path, question: object) -> None:
    assert text_of(tmp_path, question) == "[user]2+3?"


@pytest.mark.parametrize("text", ["[1, 2] is what?", "{1, 2} and [3]", '["a", "b"]', "[{x}]", "{'a': 1}"])
def test_text_with_brackets_stays_text(tmp_path: Path, text: str) -> None:
    assert text_of(tmp_path, text) == f"[user]{text}"


BAD_QUESTIONS = {
    "repr of messages": ("[{'role': 'user', 'content': '?'}]", "it looks like messages but is not JSON"),
    "repr of an array": (
        "array([{'content': '?', 'role': 'user'}], dtype=object)",
        "it looks like messages but is not JSON",
    ),
    "text of text, cut": ('"[{\\"role\\": \\"user\\"', "it looks like messages but is not JSON"),
    "share gpt with an id": ('[{"id": 1, "from": "human", "value": "?"}]', "message 1 is {'id': 1, 'from'"),
    "cut messages": ('[{"role": "user", "content": "', "it looks like messages but is not JSON"),
    "one message as text": (json.dumps(USER), "column 'question' is"),
    "one message": (USER, "column 'question' is {'role': 'user'"),
    "share gpt": ([{"from": "human", "value": "?"}], "message 1 is {'from': 'human'"),
    "share gpt as text": ('[{"from": "human", "value": "?"}]', "message 1 is {'from': 'human'"),
    "unknown role": ([{"role": "human", "content": "?"}], "message 1 has role 'human'; allowed: system, "),
    "role of capitals": ([{"role": "User", "content": "?"}], "message 1 has role 'User'"),
    "no role": ([{"role": None, "content": "?"}], "message 1 has role None"),
    "null content": ([USER, {"role": "assistant", "content": None}], "message 2 has content None; allowed"),
    "empty user": ([{"role": "user", "content": " \n"}], "message 1 (user) is empty"),
    "empty assistant": ([USER, {"role": "assistant", "content": ""}], "message 2 (assistant) is empty"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        "message 1 has a part {'type': 'image_url'",
    ),
    "tool call": (
        [USER, {"role": "assistant", "content": "a", "tool_calls": [1]}],
        "message 2 has tool_calls = [1]; only role and content are read",
    ),
    "number": (5, "column 'question' is 5; allowed: text, or a list of messages"),
}


@pytest.mark.parametrize("kind", BAD_QUESTIONS)
def test_a_prompt_that_the_model_would_not_see_as_meant_is_refused(tmp_path: Path, kind: str) -> None:
    question, said = BAD_QUESTIONS[kind]
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, GOOD | {"question": question}])
    error = error_of(path)
    assert error.startswith(f"{path}:2: column 'question'")
    assert said in error


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
HALF = "half \ud83d of it"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("question", HALF),
        ("question", [{"role": "user", "content": HALF}]),
        ("question", json.dumps([{"role": "user", "content": "x"}]) + HALF),
        ("answer", HALF),
        ("answer", ["1", HALF]),
        ("set", HALF),
        ("more", {"a": [{"b": HALF}]}),
        ("more", {HALF: 1}),
    ],
)
def test_half_a_surrogate_pair_in_any_column_that_is_read_is_refused(
    tmp_path: Path, column: str, value: object
) -> None:
    rows = [GOOD | {"set": "s", "more": {}, "unread": HALF}] * 2
    rows[1] = rows[1] | {column: value}
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    error = error_of(path, source="set", extra="more")
    assert error.startswith(rf"{path}:2: column '{column}' has half a surrogate pair, '\ud83d', in ")


def test_half_a_surrogate_pair_within_json_text_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [GOOD, GOOD | {"question": '[{"role": "user", "content": "\\ud83d"}]'}]
    )
    assert f"{path}:2: column 'question' has half a surrogate pair" in error_of(path)
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, GOOD | {"answer": '["\\ud83d"]'}])
    assert f"{path}:2: column 'answer' has half a surrogate pair" in error_of(path)


def test_a_whole_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "\\ud83d\\ude00", "answer": 1}\n')
    assert load(tmp_path / "data.jsonl")[0].text == "[user]\U0001f600"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ('["34"]', "34"),
        (r'["1", "\\frac{1}{2}"]', r"\frac{1}{2}"),
        ('["a" cut', '["a" cut'),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_list_of_answers_as_json_text_is_a_list(tmp_path: Path, gold: str, answer: str) -> None:
    [prompt] = load(write_jsonl(tmp_path / "data.jsonl", [GOOD | {"answer": gold}]))
    assert prompt.answer == answer


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), {"a": [float("nan")]}])
def test_what_an_endpoint_cannot_be_sent_is_refused_at_the_start(tmp_path: Path, value: object) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD | {"more": 1}, GOOD | {"more": value}])
    assert f"{path}:2: column 'more' does not fit into JSON, which reward.url needs" in error_of(
        path, extra="more"
    )
    assert len(load(path, extra="more")) == 2  # a function takes it


def test_nesting_that_could_not_be_sent_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps(GOOD | {"more": 1})
    path.write_text(row + "\n" + row.replace("1}", "[" * 500 + "]" * 500 + "}"))
    said = f"{path}:2: column 'more' is nested more than 64 levels deep"
    assert said in error_of(path, extra="more")
    assert said in error_of(path, answer="more")


def test_a_nested_column_that_is_text_is_said(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl",
        [{"gold": {"is": 1}, "question": "?"}, {"gold": '{"is": 1}', "question": "?"}],
    )
    error = error_of(path, answer="gold.is")
    assert f"""{path}:2: column 'gold' is text, '{{"is": 1}}'; 'gold.is' needs an object there""" in error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.jsonl", gzip.compress(b"{}", mtime=0), "it is compressed; unpack it by gunzip"),
        ("data.jsonl", b"PAR1", "it is a parquet file; its name must end in .parquet"),
        ("data.jsonl", '{"a": 1}'.encode("utf-16"), "it is UTF-16; write it as UTF-8"),
        (
            "data.jsonl",
            b'\xef\xbb\xbf [\n{"question": "?"}\n]',
            "it is one JSON array, not one JSON object on each line",
        ),
        ("data.jsonl", LFS, "it is a pointer of Git LFS"),
        ("data.parquet", LFS, "it is a pointer of Git LFS"),
        ("data.parquet", b"", "it cannot be read as parquet"),
        (
            "data.json",
            b"[]",
            "must end in .jsonl or .parquet, not '.json'; a file with one JSON array becomes",
        ),
        ("data.jsonl.gz", b"", "must end in .jsonl or .parquet, not '.gz'; unpack it by gunzip"),
    ],
)
def test_a_file_of_another_format_is_said(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = error_of(path, skip=False)
    assert error.startswith(f"{path}: ")
    assert said in error


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"question": "?", "answer": 1},', "not JSON: Extra data at character 31 of the line"),
        (b"{'question': '?'}", "not JSON: Expecting property name"),
        (b'{"question": "?", "answer": NaN}', "column 'answer' is nan"),
        (b'{"question": "?", "answer": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit (4300 digits)"),
    ],
)
def test_a_line_that_is_not_json_is_said(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "?", "answer": 1}\r\n\r\n' + line)
    assert f"{path}:3: {said}" in error_of(path)


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    offsets, data = (
        pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])),
        pyarrow.py_buffer(b"a\xff"),
    )
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data])
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": texts, "answer": ["1", "2"]}), path)
    assert f"{path}, row 2: column 'question' cannot be read: 'utf-8' codec" in error_of(path)
    config = configure(path, bad_rows="skip")
    assert [p.text for p in load_prompts(path, config.columns, Utf8Tokenizer(), config)] == ["[user]a"]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_folder_is_one_set_in_the_order_of_names(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": f"{index}?", "answer": None if index == 4 else index} for index in range(11)]
    whole, folder = tmp_path / f"set{suffix}", tmp_path / "parts" / f"set{suffix}"
    folder.mkdir(parents=True)
    write(whole, rows)
    write(folder / f"part-1{suffix}", rows[3:7])
    write(folder / f"part-0{suffix}", rows[:3])
    write(folder / f"part-2{suffix}", rows[7:])
    for ignored in ("README.md", f".hidden{suffix}", f"_metadata{suffix}"):
        (folder / ignored).write_bytes(b"?")
    sets = []
    for path in (whole, folder):
        config = configure(path, bad_rows="skip")
        prompts = load_prompts(path, config.columns, Utf8Tokenizer(), config)
        assert (prompts.report.rows, prompts.report.usable) == (11, 10)
        order = [7, 0, 9, 3, 3, 5]
        taken = [(p.id, p.text, p.answer) for p in [*prompts, *prompts.take(order)]]
        assert taken[10:] == [taken[at] for at in order]
        sets.append((taken, prompts.report.fingerprint))
    assert sets[0] == sets[1]
    config = configure(folder)
    with pytest.raises(DataError, match=f"part-1{suffix}.*2: column 'answer' is None"):
        check_prompts(folder, config.columns, config)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "a folder without a .jsonl or .parquet file in it"),
        (["data.json"], "a folder without a .jsonl or .parquet file in it"),
        (["a.jsonl", "b.parquet"], "a folder with both .jsonl and .parquet files; name one of them"),
        (
            ["train-0.jsonl", "test-0.jsonl"],
            "a folder with files of several splits, test, train; name one file",
        ),
    ],
)
def test_a_folder_that_is_not_one_set_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    assert error_of(tmp_path, skip=False).startswith(f"{tmp_path}: {said}")


def test_a_final_assistant_message_is_continued(tmp_path: Path) -> None:
    """As transformers continues it, for a template that opens the turn in the same way."""
    tokenizer = load_tokenizer(write_folder(tmp_path))
    begun = [USER, {"role": "assistant", "content": "Let me think \n"}]
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD | {"question": begun}])
    [prompt] = load(path, tokenizer)
    assert prompt.text == "<|user|>2+3?<|end|><|assistant|>Let me think \n"
    apply = tokenizer.hugging_face.apply_chat_template
    assert prompt.text == apply(begun, tokenize=False, continue_final_message=True)
    assert prompt.tokens.tolist() == tokenizer.encode(prompt.text).tolist()


THINKS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
)
BEGUN = {"role": "assistant", "content": "<think>\nFirst"}
TOOL = {"role": "tool", "content": "7"}
SYSTEM = {"role": "system", "content": "Box."}
DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (THINKS, [USER, BEGUN], "the chat template opens the assistant's turn with <think>, and so does"),
        (THINKS, [BEGUN], "the messages (assistant) begin with the answer"),
        (DROPS, [USER, TOOL], "the chat template leaves out the message of role 'tool', '7'"),
        (DROPS, [SYSTEM, USER], "the chat template leaves out the message of role 'system', 'Box.'"),
    ],
)
def test_messages_that_a_template_would_spoil_are_refused(
    tmp_path: Path, template: str, messages: list[Message], said: str
) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, template=template))
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD | {"question": messages}])
    with pytest.raises(DataError, match=re.escape(f"{path}:1: column 'question': {said}")):
        load(path, tokenizer)


LONG = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            f"{LONG}{LONG}{{% endfor %}}{{% endfor %}}",
            "computes for more",
        ),
        ("{{ 10 ** (10 ** 10) }}", "computes for more than|needs more than"),
        ("{{ 'x' * 10 ** 10 }}", "needs more than 512 MiB"),
        (
            f"{{% set n = namespace(a='x') %}}{LONG}{{% set n.a = n.a ~ n.a %}}{{% endfor %}}",
            "needs more than|computes for more than",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages .*recursion"),
        ("{{ 1 // 0 }}", "refuses the messages .*division"),
        ("{{ 'x'.center(10 ** 30) }}", "refuses the messages"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages .*unsafe"),
    ],
)
def test_a_template_that_never_ends_or_needs_all_memory_is_one_line(
    tmp_path: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tokenizer, "_RENDER_SECONDS", 0.3)
    monkeypatch.setattr(data_tokenizer, "_RENDER_BYTES", 512 << 20)
    tokenizer = load_tokenizer(write_folder(tmp_path, template=template))
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD])
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TreepoError, match=said) as caught:
        load(path, tokenizer)
    assert "\n" not in str(caught.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def test_a_line_of_any_length_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_MOST_LINE", 1 << 20)
    path, good = tmp_path / "data.jsonl", json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(good + b'"' + b"x" * 5_000_000 + b'"\n' + good + b"\n" + b"[" * 3_000_000)
    config = configure(path, bad_rows="skip")
    prompts = load_prompts(path, config.columns, Utf8Tokenizer(), config)
    assert [prompt.id for prompt in prompts] == ["data:0", "data:2"]
    assert prompts.report.skipped == {"too long": 2}
    assert "data.jsonl:2: a line of more than 1 MiB" in prompts.report.summary()
    assert prompts.report.blank_lines == 1


_FIRST_BATCH = """
import sys
from pathlib import Path
from treepo.data import parquet_rows
from treepo.data.prompts import check_prompts
from tests.data.test_prompts import configure
parquet_rows._BATCH_BYTES = 128 << 20
config = configure(Path(sys.argv[1]))
check_prompts(config.train, config.columns, config)
"""


def test_a_small_parquet_file_of_a_huge_column_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: one that has held and freed as much memory needs no more from the system."""
    text, path = "x" * (1 << 18), tmp_path / "data.parquet"
    table = pyarrow.table({"question": [text] * 1000, "answer": ["1"] * 1000})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 100_000
    ended = subprocess.run(
        [sys.executable, "-c", _FIRST_BATCH, path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = ended.stderr.splitlines()[-1]
    assert re.search(r"DataError: .*data.parquet, row 1: it and the 1023 rows after it need more than", last)


MUTATIONS = [b"\x00", b'"', b"}", b"\\ud800", b"\xff", b"[[", b"null,", b"NaN", b"\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_damaged_bytes_are_prompts_or_one_line(tmp_path: Path, suffix: str) -> None:
    drawn, path = random.Random(0), tmp_path / f"data{suffix}"
    write(path, [{"q": [USER], "a": {"b": str(index)}, "s": "é", "x": {"k": ["é"]}} for index in range(10)])
    whole, columns = path.read_bytes(), {"prompt": "q", "answer": "a.b", "source": "s", "extra": "x"}
    config = configure(path, columns, bad_rows="skip")
    errors, skipped = [], 0
    for _ in range(150):
        damaged, at = bytearray(whole), drawn.randrange(len(whole))
        damaged[at : at + drawn.choice([0, 1, 30])] = drawn.choice(MUTATIONS)
        path.write_bytes(damaged)
        try:
            prompts = load_prompts(path, config.columns, Utf8Tokenizer(), config)
            assert len(list(prompts)) == prompts.report.usable
            skipped += prompts.report.skipped.total()
        except DataError as error:
            errors.append(str(error))
    for error in errors:
        assert error.startswith(f"{path}: ")
        assert "\n" not in error
        error.encode()
    assert skipped + len(errors) > 50  # the damage is real


def test_a_column_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    arrays = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array(["1"])]
    table = pyarrow.Table.from_arrays(arrays, names=["question", "question", "answer"])
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path)
    assert "column 'question' is there 2 times" in error_of(path, skip=False)
