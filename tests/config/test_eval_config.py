"""`treepo eval` on the command line: options and YAML give one configuration, and a mistake is one line."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.paths import ROOT, SHARED
from tests.support.sglang_http import FakeServer
from tests.support.tiny import write_tiny_qwen2
from treepo.cli.main import app
from treepo.config.evaluate import BenchmarkConfig, EvalConfig, overrides_of
from treepo.config.load import load_as
from treepo.errors import ConfigError, TreepoError
from treepo.preflight.inputs import read_evaluation_inputs
from treepo.toy.byte_tokenizer import byte_tokenizer
from treepo.toy.problems import draw_problems, rows

DATA = SHARED / "data" / "math"


def from_options(*overrides: str, **options: Any) -> EvalConfig:
    return load_as(EvalConfig, None, [*overrides_of(options), *overrides])


def test_options_and_yaml_give_the_same_configuration(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(
        "out: o\nseed: 3\nmodel: {path: m}\n"
        "data:\n  benchmarks: [{path: d/gsm8k.jsonl}, {path: x.jsonl}]\n  chat_template: false\n"
        "  max_problems: 5\n  max_prompt_tokens: 100\n  system_prompt: '#### a: b'\n"
        "sampling: {width: 4, mode: tree, temperature: 0.5, max_response_tokens: 99}\n"
    )
    options = from_options(
        out=Path("o"),
        seed=3,
        model="m",
        data=[Path("d/gsm8k.jsonl"), Path("x.jsonl")],
        chat_template=False,
        max_problems=5,
        max_prompt_tokens=100,
        system_prompt="#### a: b",
        samples=4,
        tree=True,
        temperature=0.5,
        max_tokens=99,
        tokenizer=None,
    )
    assert load_as(EvalConfig, path) == options
    assert load_as(EvalConfig, path, overrides_of({"samples": 8})).sampling.width == 8


def test_a_url_takes_the_place_of_a_path_and_the_other_way_round() -> None:
    base = {"out": "o", "data": [Path("x.jsonl")]}
    server = from_options(*overrides_of({"model": "http://h:1"}), model="m", **base)
    assert (server.model.url, server.model.path) == ("http://h:1", None)
    assert from_options(*overrides_of({"model": "m"}), model="http://h:1", **base).model.path == Path("m")


def test_columns_are_guessed_from_the_name_of_a_file_only_if_a_map_is_shipped() -> None:
    config = from_options(
        out="o", model="m", data=[Path("a/gsm8k.parquet"), Path("x.jsonl"), Path("gsm8k-2.jsonl")]
    )
    gsm8k, *others = config.data.benchmarks
    assert gsm8k.columns.answer_after == "#### "
    assert (gsm8k.shipped_map, gsm8k.label) == ("gsm8k", "gsm8k")
    assert [(other.columns.prompt, other.shipped_map) for other in others] == [("prompt", None)] * 2
    chosen = from_options(
        'data.benchmarks=[{"path": "gsm8k.jsonl", "columns": {"prompt": "q"}}]', out="o", model="m"
    )
    assert (chosen.data.benchmarks[0].columns.prompt, chosen.data.benchmarks[0].shipped_map) == ("q", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.benchmarks=[]"], "data.benchmarks: List should have at least 1 item"),
        (
            ['data.benchmarks=[{"path": "x", "pth": "x"}]'],
            "data.benchmarks.0.pth: unknown key; did you mean 'path'?",
        ),
        (['data.benchmarks=[{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}]'], "2 benchmarks are named 'x'"),
        (["model.path=null"], "neither path nor url is given; exactly one"),
        (["model.url=http://h:1"], "path = m and url = http://h:1; exactly one"),
        (["model.url=h:1", "model.path=null"], "model.url: String should match pattern"),
        (["model.tokenizer=t"], "tokenizer = t has no effect: the model at path = m"),
        (["sampling.temperature=0"], "temperature = 0 gives the same response every time, but width = 16"),
        (["sampling.oversample=1.5"], "sampling: oversample = 1.5: every prompt is sampled once"),
        (["samplign.width=3"], "unknown key; did you mean 'sampling'?"),
        (["sampling.stops.boxes=end"], "sampling.stops.boxes: unknown key; did you mean 'boxed'?"),
    ],
)
def test_a_mistake_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_options(*overrides_of({"out": "o", "model": "m", "data": [Path("x.jsonl")]}), *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_in_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(
        "out: o\nmodel: {path: m}\ndata:\n  benchmarks:\n    - path: a.jsonl\n    - pth: b.jsonl\n"
    )
    with pytest.raises(ConfigError) as error:
        load_as(EvalConfig, path)
    assert f"{path}:6: data.benchmarks.1.pth: unknown key; did you mean 'path'?" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "command line: out: required, but not given"),
        (("none.yaml",), "none.yaml: No such file"),
        (("--model", "m", "--data", "x.jsonl", "--out", "o"), "m: no such folder"),
        (
            ("--model", "m", "--data", "x.jsonl", "--out", "o", "--samples", "0"),
            "sampling.width: should be greater",
        ),
        (("--compare", "a"), "at least two folders are needed, 1 given"),
        (("--compare", "a", "b"), "a/results.json: No such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    """`main` shows such an error as a line (tests/cli)."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TreepoError) as error:
        app(["eval", *arguments], standalone_mode=False)
    assert any(message in line for line in str(error.value).splitlines())
    assert error.value.exit_code == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer, and a few problems."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = byte_tokenizer(max_tokens=1024).hugging_face
    write_tiny_qwen2(folder / "model", vocab_size=512, max_position_embeddings=1024)
    tokenizer.save_pretrained(folder / "model")
    for name in ("one", "two"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for row in rows(draw_problems(np.random.default_rng(0), 6), "test"):
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    return {
        "out": "o",
        "model": "model",
        "data": [Path("one.jsonl"), Path("two.jsonl")],
        "max_tokens": 64,
        "max_prompt_tokens": 256,
    }


def test_problems_are_named_after_their_benchmark_and_each_has_its_limit(options: dict[str, Any]) -> None:
    benchmarks = '[{"path": "one.jsonl", "name": "x", "max_problems": 1}, {"path": "two.jsonl"}]'
    inputs = read_evaluation_inputs(
        from_options(*overrides_of(options), f"data.benchmarks={benchmarks}", max_problems=2)
    )
    assert list(inputs.prompts) == ["x:0", "two:0", "two:1"]
    assert inputs.benchmarks[0].report.usable == 6


def test_without_the_chat_template_a_prompt_is_its_text(options: dict[str, Any]) -> None:
    plain = read_evaluation_inputs(from_options(**options, chat_template=False, system_prompt="Think."))
    question = json.loads(Path("one.jsonl").read_text().splitlines()[0])["prompt"][-1]["content"]
    assert plain.prompts["one:0"].text == f"Think.\n\n{question}"
    assert "user" in read_evaluation_inputs(from_options(**options)).prompts["one:0"].text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "= 256 + 1000 = 1256, but model has 1024 positions"),
        (["sampling.max_response_tokens=64", "data.benchmarks.0.path=x"], "benchmarks is [{'path'"),
        (["sampling.max_response_tokens=64", "data.max_prompt_tokens=9"], "data.max_prompt_tokens allows 9"),
    ],
)
def test_lengths_that_do_not_fit_are_found_before_anything_starts(
    options: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(TreepoError) as error:
        read_evaluation_inputs(from_options(*overrides_of(options | {"max_tokens": 1000}), *overrides))
    assert message in str(error.value)


def test_a_servers_tokenizer_must_be_on_this_machine(options: dict[str, Any]) -> None:
    async def read(**more: Any) -> Any:
        server = FakeServer(FakeEngine())
        url = await server.start()
        try:
            return await asyncio.to_thread(
                read_evaluation_inputs, from_options(**(options | {"model": url} | more))
            )
        finally:
            await server.close()

    with pytest.raises(
        ConfigError, match="folder of its tokenizer, /nowhere/model, is not on this machine; --tok"
    ):
        asyncio.run(read())
    inputs = asyncio.run(read(tokenizer=Path("model")))
    assert (len(inputs.prompts), inputs.kv_tokens) == (12, 5000)
    with pytest.raises(ConfigError, match="takes 900 tokens in all"):
        asyncio.run(read(tokenizer=Path("model"), max_tokens=800))


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not there")
def test_the_preset_reads_every_benchmark(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "math").symlink_to(DATA)
    smaller = ["sampling.max_response_tokens=64", "data.max_prompt_tokens=900", "data.bad_rows=skip"]
    config = load_as(
        EvalConfig, ROOT / "examples" / "eval-math.yaml", [f"model.path={folder / 'model'}", *smaller]
    )
    inputs = read_evaluation_inputs(config)
    assert [benchmark.config.shipped_map for benchmark in inputs.benchmarks] == [
        benchmark.config.label for benchmark in inputs.benchmarks
    ]
    assert [benchmark.report.rows for benchmark in inputs.benchmarks] == [30, 40, 1319, 272, 675]


@pytest.mark.parametrize(("count", "gpus", "engines"), [(None, 0, 1), (None, 4, 4), (2, 4, 2), (2, 0, 2)])
def test_there_is_an_engine_for_each_gpu_unless_a_number_is_given(
    count: int | None, gpus: int, engines: int
) -> None:
    config = from_options(f"engine.count={json.dumps(count)}", out="o", model="m", data=[Path("x.jsonl")])
    assert config.engine.on(gpus).count == engines


@pytest.mark.parametrize("path", ["data/gsm8k.jsonl", "data/gsm8k", "data/gsm8k/", "data/gsm8k.parquet/"])
def test_a_folder_has_the_columns_of_its_name(path: str) -> None:
    benchmark = BenchmarkConfig.model_validate({"path": path})
    assert (benchmark.label, benchmark.shipped_map) == ("gsm8k", "gsm8k")
