"""Held-out sets: their defaults, and combinations that cannot work."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from treepo.config.data import ColumnsConfig
from treepo.config.load import dump_config, load_config
from treepo.config.run import RunConfig
from treepo.errors import ConfigError

BASE = {"out": "run", "steps": 4, "model": {"path": "m"}, "data": {"train": "t.jsonl", "heldout": "h.jsonl"}}


def load(tmp_path: Path, evaluation: Any, *overrides: str, **data: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {"data": BASE["data"] | data, "evaluation": evaluation}))
    return load_config(path, overrides)


def test_a_set_has_the_options_of_the_section_and_the_columns_of_the_held_out_file(tmp_path: Path) -> None:
    sets = {
        "aime": {"path": "a.jsonl", "samples": 8},
        "math": {"path": "m", "columns": "gsm8k", "top_p": 1.0},
    }
    evaluation = {"samples": 4, "temperature": 0.5, "top_p": 0.9, "sets": sets}
    config = load(tmp_path, evaluation, columns={"prompt": "q"}, heldout_columns={"prompt": "p"})
    found = config.heldout_sets
    assert list(found) == ["heldout", "aime", "math"]
    assert [one.samples for one in found.values()] == [4, 8, 4]
    assert [one.temperature for one in found.values()] == [0.5] * 3
    assert [one.top_p for one in found.values()] == [0.9, 0.9, 1.0]
    assert [one.path.name for one in found.values()] == ["h.jsonl", "a.jsonl", "m"]
    assert [one.columns.prompt for one in found.values()] == ["p", "p", "question"]
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    alone = load(tmp_path, {"sets": sets}, columns={"prompt": "q"}).heldout_sets
    assert alone["aime"].columns == ColumnsConfig(prompt="q")


@pytest.mark.parametrize(
    ("best", "heldout", "sets", "expected"),
    [
        ("accuracy", "h", [], "heldout"),
        ("accuracy", "h", ["a", "b"], "heldout"),
        ("b/accuracy", "h", ["a", "b"], "b"),
        ("accuracy", None, ["a"], "a"),
        (None, "h", ["a"], None),
    ],
)
def test_the_best_is_of_one_set(
    tmp_path: Path, best: str | None, heldout: str | None, sets: list[str], expected: str | None
) -> None:
    evaluation = {"every": 2, "best": best, "sets": {name: {"path": "x"} for name in sets}}
    assert load(tmp_path, evaluation, heldout=heldout).best_set == expected


@pytest.mark.parametrize(
    ("evaluation", "overrides", "message"),
    [
        (
            {"best": "accuracy"},
            [],
            "best = accuracy with every = null: there is an accuracy before and after",
        ),
        (
            {"every": 1, "best": "reward"},
            [],
            "should be accuracy, or NAME/accuracy with the name of a set, found",
        ),
        ({"every": 1, "best": "a/accuracy"}, [], "should be one of heldout, found 'a'"),
        (
            {"every": 1, "best": "accuracy", "sets": {"a": {"path": "x"}, "b": {"path": "x"}}},
            ["data.heldout=null"],
            "with 2 sets: one of a/accuracy, b/accuracy is allowed",
        ),
        (
            {"every": 1, "best": "accuracy"},
            ["checkpoint.every=null"],
            "checkpoint.every = null: no checkpoint is",
        ),
        (
            {"every": 1},
            ["data.heldout=null"],
            "with data.heldout = null and no evaluation.sets: there is nothing",
        ),
        (
            {"sets": {"a b": {"path": "x"}}},
            [],
            "'a b' is no name of a set: letters, digits, _ and - are allowed",
        ),
        (
            {"sets": {"heldout": {"path": "x"}}},
            [],
            "'heldout' is the set in data.heldout; give this one another",
        ),
        ({"sets": {"a": {"pth": "x"}}}, [], "evaluation.sets.a.pth: unknown key; did you mean 'path'?"),
        (
            {"sets": {"a": {"path": "x", "columns": {"pr": ""}}}},
            [],
            "columns.pr: unknown key; did you mean 'prompt'",
        ),
        ({}, ["evaluation.sets.a=x"], "evaluation.sets.a: should be a section (keys and values), found 'x'"),
        (
            {"temperature": 0, "samples": 2},
            [],
            "evaluation: temperature = 0 gives the same response every time",
        ),
        (
            {"min_p": 0.1},
            ["engine.sglang={enable_deterministic_inference: true}"],
            "evaluation.min_p = 0.1 with engine.sglang.enable_deterministic_inference: SGLang has no min_p",
        ),
    ],
)
def test_what_cannot_work_is_one_line(
    tmp_path: Path, evaluation: Any, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, evaluation, *overrides)
    assert any(message in line for line in str(error.value).splitlines()), str(error.value)


def test_a_mistake_in_what_sets_inherit_is_said_once(tmp_path: Path) -> None:
    sets = {"a": {"path": "x"}, "b": {"path": "x"}}
    for evaluation, data in (({"samples": 0}, {}), ({}, {"columns": {"promt": "x"}})):
        with pytest.raises(ConfigError) as error:
            load(tmp_path, {**evaluation, "sets": sets}, **data)
        assert "\n" not in str(error.value)
