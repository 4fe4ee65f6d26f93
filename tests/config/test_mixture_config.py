"""`data.train` as a path or as a list of files with weights: what loads, and what is refused how."""

from pathlib import Path

import pytest

from treepo.config.data import ColumnsConfig, TrainFileConfig
from treepo.config.load import dump_config, load_config
from treepo.errors import ConfigError

HEAD = "out: runs/x\nsteps: 3\nmodel: {path: m}\ndata:\n"
MIXTURE = HEAD + "  train:\n    - {path: d/a.jsonl, weight: 3, columns: gsm8k}\n    - b.parquet\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_list_of_files_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MIXTURE))
    gsm8k = ColumnsConfig.model_validate("gsm8k")
    assert config.data.mixture == [
        TrainFileConfig(path=Path("d/a.jsonl"), weight=3, columns=gsm8k),
        TrainFileConfig(path=Path("b.parquet")),
    ]
    assert [file.label for file in config.data.mixture] == ["a", "b"]
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_an_override_replaces_the_list_and_a_path(tmp_path: Path) -> None:
    path = write(tmp_path, MIXTURE)
    assert load_config(path, ["data.train=c.jsonl"]).data.train == Path("c.jsonl")
    assert load_config(path, ["data.train=c.jsonl"]).data.mixture == ()
    mixture = load_config(
        write(tmp_path, HEAD + "  train: t.jsonl\n"), ["data.train=[c.jsonl, d]"]
    ).data.mixture
    assert [(file.path, file.weight) for file in mixture] == [(Path("c.jsonl"), 1), (Path("d"), 1)]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[a, {path: b, wieght: 2}]", "run.yaml:5: data.train.1.wieght: unknown key; did you mean 'weight'?"),
        ("[{path: a, weight: 0}]", "run.yaml:5: data.train.0.weight: should be greater than 0, found 0"),
        ("[a, {weight: 2}]", "data.train.1.path: required, but not given"),
        (
            "[a, {path: b, columns: {promt: p}}]",
            "data.train.1.columns.promt: unknown key; did you mean 'prompt'?",
        ),
        ("[a, {path: b, columns: gsm9k}]", "data.train.1.columns: should be one of aime24,"),
        ("[a.jsonl, x/a.parquet]", "data.train: 2 files are named 'a'; give each a `name` of its own"),
        ("[a, 'b c.jsonl']", "data.train.1: b c.jsonl would be named 'b c'; give it a `name` of letters"),
        ("[a, ..]", "data.train.1: .. would be named '..'; give it a `name`"),
        ("[{path: a, name: x/y}]", "data.train.0.name: "),
        ("[]", "data.train: List should have at least 1 item"),
        ("5", "data.train: should be a path, or a list of files, each a path or a section"),
        ("{path: a}", "data.train: should be a path, or a list of files, each a path or a section"),
        (
            "[{path: a, weight: 0.3333333}, b]",
            "data.train: the weights 0.3333333, 1.0 are as whole numbers 13333333 together; at most 1000000",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, HEAD + f"  train: {train}\n"))
    assert message in str(error.value)
    assert "run.yaml:5: " in str(error.value)
    assert "\n" not in str(error.value)
