"""Whatever a file holds, a command that reads it succeeds or ends with one line and exit code 2 or 1."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.evaluations import config_of, document, graded_problem, prompt_of
from tests.support.paths import ROOT
from tests.training.test_resume import inputs, write_run
from treepo.cli.evaluate import _compare
from treepo.cli.main import exit_code_of
from treepo.config.evaluate import EvalConfig
from treepo.config.load import load_as
from treepo.config.rollout import RolloutConfig
from treepo.config.run import RunConfig
from treepo.data.folder_lock import locked
from treepo.evaluation.folder import EvaluationFolder, SessionCost
from treepo.toy.make import _read_stamp
from treepo.toy.recipe import RECIPE
from treepo.training.resume import find_resume
from treepo.training.run_folder import RunFolder
from treepo.tree import Verdict

MUTANTS = 30  # of each file
LONGEST = 1000  # characters of an error line
PROMPTS = {prompt.id: prompt for prompt in (prompt_of("b", index) for index in range(3))}

# Values of other types and sizes, as JSON and YAML.
VALUES = [
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1.5",
        b"1e999",
        b"NaN",
        b"1" + b"0" * 30,
        b"1" * 5000,
        b"0x" + b"f" * 9000,
    ),
    *(
        b'""',
        b'"x"',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"' + b"y" * 3000 + b'"',
        b"[]",
        b"{}",
        b"[[1]]",
        b'{"a": 1}',
    ),
    *(
        b"2024-02-30",
        b"!!python/object:os.system x",
        b"!!int abc",
        b"!!timestamp x",
        b"&a [*a]",
        b"*a",
        b"<<: 1",
    ),
]
NOISE = [
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\t",
    b"\n",
    b"\r",
    b"[" * 5000,
    b"{" * 2000,
    b"- " * 3000,
    b'"',
    b"'",
    b": ",
    b",",
]


def mutants(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three changes."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(7):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
            case 2:
                content = content[:at] + rng.choice(NOISE) + content[at:]
            case 3 | 4:  # a value of another type
                colons = [index for index, byte in enumerate(content) if byte in b":["]
                if colons:
                    start = rng.choice(colons) + 1
                    end = min(
                        (end for mark in b",}]\n" if (end := content.find(mark, start)) > 0), default=start
                    )
                    content = content[:start] + b" " + rng.choice(VALUES) + content[end:]
            case 5:
                lines = content.split(b"\n")
                lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                content = b"\n".join(lines)
            case 6:
                lines = content.split(b"\n")
                del lines[rng.randrange(len(lines))]
                content = b"\n".join(lines)
    return content


def damage(path: Path, number: int) -> None:
    """Damage the file in the way of this number, the same in every run."""
    content = path.read_bytes()
    match number:
        case 0:
            path.write_bytes(b"")
        case 1:
            path.write_bytes(content.decode().encode("utf-16"))
        case 2:
            path.unlink()
            path.mkdir()
        case 3:
            path.unlink()
            path.symlink_to(path)
        case 4:
            path.write_bytes(content + b"\n" + b"z" * (1 << 21))
        case 5:
            path.write_bytes(b"[" * 200_000)
        case 6:
            path.unlink()
        case _:
            path.write_bytes(mutants(content, random.Random(f"{path.name} {number}")))


def run_config(out: Path) -> RunConfig:
    return RunConfig.model_validate(
        {"out": str(out), "steps": 9, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    )


def resume(folder: Path) -> None:
    config = run_config(folder)
    found = find_resume(config, inputs())
    with RunFolder(config, None if found is None else found.state):
        pass


def continue_evaluation(folder: Path) -> None:
    with locked(folder):
        evaluation = EvaluationFolder(config_of(str(folder), 2), PROMPTS, "m")
        with evaluation:
            assert len(list(evaluation.problems())) == len(evaluation.results)


def compare(folder: Path) -> None:
    _compare([str(folder / "results.json"), str(folder / "other.json")], folder / "plot.svg")


def read_toy(folder: Path) -> None:
    _read_stamp(folder, "fingerprint", RECIPE)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, whole."""
    root = tmp_path_factory.mktemp("originals")
    for name, example in (("run", "quickstart"), ("rollout", "rollout"), ("eval", "eval-toy")):
        (root / name).mkdir()
        shutil.copy(ROOT / "examples" / f"{example}.yaml", root / name / "config.yaml")
    write_run(run_config(root / "resume"), steps=3, saved=2)
    verdicts = [Verdict.CORRECT, Verdict.WRONG]
    problems = [(prompt, graded_problem(prompt, verdicts)) for prompt in PROMPTS.values()]
    config = config_of(str(root / "evaluation"), 2)
    with EvaluationFolder(config, PROMPTS, "m") as folder:
        for _, problem in problems:
            folder.write(problem, SessionCost(0, 1, 1.0, 1, 1, 1, 1, 0))
    (root / "compare").mkdir()
    for name in ("results", "other"):
        (root / "compare" / f"{name}.json").write_text(
            json.dumps(document(config, {"b": problems}), indent=1)
        )
    (root / "toy").mkdir()
    stamp = {
        "fingerprint": "fingerprint",
        "files": {},
        "parameters": 3,
        "sampled_accuracy": 0.4,
        "seconds": 1.0,
    }
    (root / "toy" / "toy.json").write_text(json.dumps(stamp))
    return root


def reader_of(schema: type[RunConfig | RolloutConfig | EvalConfig]) -> Callable[[Path], object]:
    return lambda folder: load_as(schema, folder / "config.yaml")


READERS: dict[str, Callable[[Path], object]] = {
    "run": reader_of(RunConfig),
    "rollout": reader_of(RolloutConfig),
    "eval": reader_of(EvalConfig),
    "resume": resume,
    "evaluation": continue_evaluation,
    "compare": compare,
    "toy": read_toy,
}
FILES = [
    *("run/config.yaml", "rollout/config.yaml", "eval/config.yaml"),
    *("resume/config.yaml", "resume/metrics.jsonl", "resume/trees.jsonl"),
    "resume/checkpoints/step-00002/checkpoint.json",
    *("evaluation/config.yaml", "evaluation/trees.jsonl", "evaluation/samples.jsonl"),
    *("compare/results.json", "toy/toy.json"),
]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_one_line(
    file: str,
    originals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = file.split("/")[0]
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of folders that nobody needs after a crash
    codes = []
    for number in range(MUTANTS):
        folder = tmp_path / str(number)
        shutil.copytree(originals / kind, folder)
        damage(folder.joinpath(*file.split("/")[1:]), number)
        codes.append(exit_code_of(lambda folder=folder: READERS[kind](folder)))
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert codes[-1] in (0, 1, 2), (number, lines)
        assert bool(lines) == (codes[-1] > 0), (number, lines)
        assert all(line.strip() and len(line) < LONGEST for line in lines), (number, lines)
        assert len(lines) <= (1 if kind in ("toy", "compare") or "jsonl" in file else 21), (number, lines)
        assert "Traceback" not in captured.out + captured.err, (number, lines)
        shutil.rmtree(folder)
    assert kind == "toy" or any(codes)
