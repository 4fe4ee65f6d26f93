"""One preflight for every command that starts engines: a model that SGLang cannot serve is refused by all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import POSITIONS
from tests.support.preflight_commands import ENGINES, RESPONSE, evaluate, run, train
from tests.support.tiny import write_tiny_qwen3_moe
from treepo.config.evaluate import EvalConfig
from treepo.config.run import RunConfig
from treepo.errors import DataError, TreepoError
from treepo.preflight.inputs import read_evaluation_inputs, read_train_inputs

KEPT_FREE = 6
FITS = POSITIONS - KEPT_FREE - RESPONSE


@pytest.mark.parametrize("command", ENGINES)
def test_every_command_makes_the_same_checks(command: Callable[..., Any], folder: Path) -> None:
    run(command)
    run(command, FITS)
    with pytest.raises(
        TreepoError, match=rf"of which SGLang keeps {KEPT_FREE} free: {POSITIONS - KEPT_FREE} are"
    ):
        run(command, FITS + 1)
    with pytest.raises(TreepoError, match=r"engine\.max_total_tokens = 290, of which SGLang keeps"):
        run(command, max_total_tokens=290)
    with pytest.raises(TreepoError, match=r"engine\.tensor = 3: model has \d+ attention heads"):
        run(command, tensor=3)
    write_tiny_qwen3_moe(folder, vocab_size=512)  # with a dense layer
    with pytest.raises(TreepoError, match=r"mlp_only_layers = \[1\] in config\.json; SGLang serves"):
        run(command)


@pytest.mark.parametrize("command", ENGINES)
def test_every_command_reads_rows_by_the_same_rules(command: Callable[..., Any], folder: Path) -> None:
    problems = folder.parent / "problems.jsonl"
    lines = problems.read_text().splitlines()
    row = json.loads(lines[1]) | {"data_source": "half \ud83d"}
    problems.write_text(f"{lines[0]}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=r"problems.jsonl:2: column 'data_source' has half a surrogate pair"):
        run(command)


@pytest.mark.parametrize("command", [train, evaluate])
def test_an_extra_column_that_the_endpoint_cannot_be_sent_is_refused(
    command: Callable[..., Any], folder: Path
) -> None:
    problems = folder.parent / "problems.jsonl"
    rows = [json.loads(line) | {"more": float("nan")} for line in problems.read_text().splitlines()]
    problems.write_text("\n".join(map(json.dumps, rows)))
    columns = {"extra": "more"}

    def with_extra(settings: dict[str, Any], data: dict[str, Any]) -> None:
        reward = {"url": "http://127.0.0.1:1/"}
        if command is train:
            train(settings | {"reward": reward}, data | {"columns": columns})
        else:
            benchmarks = [{"path": "problems.jsonl", "columns": columns}]
            config = settings | {"reward": reward, "data": data | {"benchmarks": benchmarks}}
            read_evaluation_inputs(EvalConfig.model_validate(config))

    with pytest.raises(DataError, match=r"problems.jsonl:1: column 'more' does not fit into JSON"):
        run(with_extra)


def test_an_error_in_a_mixture_names_the_file_and_its_key(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder.parent / "problems.jsonl").read_text().splitlines()]
    renamed = [{"question": row["prompt"], "number": 1} for row in rows]
    (folder.parent / "more.jsonl").write_text("\n".join(map(json.dumps, renamed)))

    def with_more(more: object) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        data = {"train": ["problems.jsonl", more], "prompts_per_step": 2}

        def read(settings: dict[str, Any], given: dict[str, Any]) -> None:
            read_train_inputs(RunConfig.model_validate(settings | {"steps": 1, "data": given | data}))

        return read

    for more, said in (
        ("none.jsonl", r"^data\.train\.1: none\.jsonl: no such file"),
        ("more.jsonl", r"^data\.train\.1: more\.jsonl:1: .*\(data\.columns names the columns\)"),
        (
            {"path": "more.jsonl", "columns": {"prompt": "question"}},
            r"^data\.train\.1: more\.jsonl:1: .*\(data\.train\.1\.columns names the columns\)",
        ),
    ):
        with pytest.raises(DataError, match=said):
            run(with_more(more))
    run(
        with_more(
            {"path": "more.jsonl", "columns": {"prompt": "question", "answer": "number", "source": None}}
        )
    )
