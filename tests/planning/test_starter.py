"""`treepo init`: what it finds in a data file and on a machine, and that its file is what it says."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.errors import ConfigError, DataError
from treepo.planning.found_machine import Machine, machine_of
from treepo.planning.hardware import GIB
from treepo.planning.starter import Problems, _find_columns, first_config, render

CPU = Machine(0, "cpu", "the CPU of this machine", 16)
EIGHT = Machine(8, "h100", "8 x H100", 1024)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 4096}))
    return folder


def problems(rows: int = 1000, longest: int = 100) -> Problems:
    return Problems(Path("train.jsonl"), "gsm8k", rows, longest, all_usable=True)


def fits(_: RunConfig) -> None:
    return None


@pytest.mark.parametrize("machine", [CPU, EIGHT, Machine(6, "a100-80gb", "6 x A100", 512)])
def test_the_file_says_what_was_planned(model: Path, tmp_path: Path, machine: Machine) -> None:
    chosen = first_config(model, problems(), Path("runs/x"), machine, fits)
    file = tmp_path / "train.yaml"
    file.write_text(render(chosen, problems(), machine, file))
    assert load_config(file) == chosen
    assert chosen.trainer.parallel.ranks == max(machine.gpus, 1)
    assert chosen.engine.count * chosen.engine.tensor == max(machine.gpus, 1)
    assert chosen.data.max_prompt_tokens == 128
    assert chosen.sampling.longest_response == chosen.sampling.max_response_tokens
    assert chosen.data.max_prompt_tokens + chosen.sampling.max_response_tokens <= 4096


@pytest.mark.parametrize("name", ["true", "12", "a b", "x: y", "#1", "1e-6", "\u00e9", "line\nbreak"])
def test_any_name_of_a_file_is_read_back(model: Path, tmp_path: Path, name: str) -> None:
    odd = Problems(Path(name), {}, 100, 10, all_usable=True)
    chosen = first_config(model, odd, Path(name), CPU, fits)
    file = tmp_path / "train.yaml"
    file.write_text(render(chosen, odd, CPU, Path(name)))
    assert load_config(file) == chosen


def test_layouts_are_tried_from_the_fastest_on(model: Path) -> None:
    tried = []

    def only_the_smallest(config: RunConfig) -> str | None:
        parallel, trainer = config.trainer.parallel, config.trainer
        tried.append((parallel.tensor, trainer.offload, trainer.recompute))
        if parallel.tensor == 2:
            raise ConfigError("the heads cannot be divided")
        return None if tried[-1] == (4, "optimizer", "full") else "too large"

    chosen = first_config(model, problems(), Path("r"), EIGHT, only_the_smallest)
    assert chosen.engine.tensor == 4
    assert tried[:3] == [(1, "none", "none"), (1, "optimizer", "none"), (1, "optimizer", "full")]
    with pytest.raises(ConfigError, match="does not fit 8 x H100: too large"):
        first_config(model, problems(), Path("r"), EIGHT, lambda _: "too large")


def test_prompts_that_leave_no_room_or_are_too_few(model: Path) -> None:
    with pytest.raises(ConfigError, match="no room for a response of 64"):
        first_config(model, problems(longest=4090), Path("r"), CPU, fits)
    with pytest.raises(ConfigError, match="has 7 usable rows; 8 GPUs need 8"):
        first_config(model, problems(rows=7), Path("r"), EIGHT, fits)
    assert first_config(model, problems(rows=13), Path("r"), EIGHT, fits).data.prompts_per_step == 8


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "1+1?", "reward_model": {"ground_truth": "2"}, "data_source": "s"}, {}),
        ({"question": "1+1?", "answer": "It is 2.\n#### 2"}, "gsm8k"),
        ({"problem": "1+1?", "answer": 2.0, "solution": "x"}, "aime24"),
        ({"problem": "1+1?", "solution": "so \\boxed{2}"}, "minerva_math"),
        ({"question": "1+1?", "answer": "2"}, {"prompt": "question", "answer": "answer", "source": None}),
        ({"prompt": "1+1?", "answer": "2"}, {"prompt": "prompt", "answer": "answer", "source": None}),
    ],
)
def test_columns_are_found(tmp_path: Path, row: dict[str, object], columns: object) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert _find_columns(file)[0] == columns


def test_columns_that_nobody_knows_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": "1+1=2"}) + "\n")
    with pytest.raises(DataError, match="no column map gives most rows a prompt and an answer") as error:
        _find_columns(file)
    assert len(str(error.value).splitlines()) == 1


def test_the_gpus_of_a_machine_have_the_planner_s_names() -> None:
    h100, a100 = ("NVIDIA H100 80GB HBM3", int(79.6 * GIB)), ("NVIDIA A100-SXM4-40GB", int(39.5 * GIB))
    assert machine_of([h100] * 2, 64 * GIB) == Machine(2, "h100", f"2 x {h100[0]}", 64)
    assert machine_of([a100], GIB).device == "a100-40gb"
    assert machine_of([("NVIDIA L40S", int(44.5 * GIB))], GIB).device == "a100-40gb"
    assert machine_of([("NVIDIA H200", int(140 * GIB))], GIB).device == "h200"
    assert machine_of([], GIB).device == "cpu"
    with pytest.raises(ConfigError, match="NVIDIA L4 has 22 GiB, and the planner knows no device of less"):
        machine_of([("NVIDIA L4", 22 * GIB)], GIB)
    with pytest.raises(ConfigError, match="the GPUs of this machine differ"):
        machine_of([h100, a100], GIB)


def test_train_accepts_what_init_writes_and_init_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real planner, on the machine of the test."""
    from tests.support.command import write_model_and_problems
    from treepo.cli.main import app
    from treepo.preflight.inputs import read_train_inputs

    monkeypatch.chdir(tmp_path)
    write_model_and_problems(tmp_path, tmp_path / "train.jsonl", count=20)
    arguments = ["init", "--model", "model", "--data", "train.jsonl", "--out", "mine.yaml"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("mine.yaml: 20 problems, the CPU of this machine")
    config = load_config(Path("mine.yaml"))
    assert config.out == Path("runs/mine")
    assert len(read_train_inputs(config).train) == 20
    assert yaml.safe_load(Path("mine.yaml").read_text())["plan"]["device"] == "cpu"
    with pytest.raises(ConfigError, match=r"mine\.yaml exists, and init overwrites nothing"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
