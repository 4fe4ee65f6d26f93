"""Resuming an evaluation: what a killed one leaves, and what must not be mixed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.evaluations import config_of, graded_problem, prompt_of
from treepo.errors import ConfigError, DataError
from treepo.evaluation.folder import EvaluationFolder, SessionCost
from treepo.tree import Verdict

C, W, T = Verdict.CORRECT, Verdict.WRONG, Verdict.TIMEOUT
PROMPTS = {prompt.id: prompt for prompt in (prompt_of("b", index) for index in range(5))}
SURROGATES = "\ud800 \u2028 \0"


def spent(session: int, seconds: float) -> SessionCost:
    return SessionCost(session, 2, seconds, 10, 20, 30, 4, 0)


def write(folder: EvaluationFolder, indices: range, session: int = 0) -> None:
    with folder:
        for index in indices:
            problem = graded_problem(
                PROMPTS[f"b:{index}"], [C, W, T], text=lambda leaf: f"{leaf} {SURROGATES}", answer=SURROGATES
            )
            folder.write(problem, spent(session, float(index)))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_finished_problems_are_found_again(out: Path) -> None:
    config = config_of(str(out), 3)
    first = EvaluationFolder(config, PROMPTS, "m")
    write(first, range(3))
    again = EvaluationFolder(config, PROMPTS, "m")
    assert again.results == first.results
    assert list(again.results) == ["b:0", "b:1", "b:2"]
    write(again, range(3, 5), session=1)
    last = EvaluationFolder(config, PROMPTS, "m")
    assert list(last.results) == list(PROMPTS)
    assert last.spent == {0: spent(0, 2.0), 1: spent(1, 4.0)}
    assert [(row["problem"], row["sample"]) for row in lines(out / "samples.jsonl")] == [
        (name, sample) for name in PROMPTS for sample in range(3)
    ]
    assert lines(out / "samples.jsonl")[1]["text"] == f"1 {SURROGATES}"


@pytest.mark.parametrize("name", ["trees.jsonl", "samples.jsonl"])
def test_wherever_a_kill_cuts_a_file_only_finished_problems_are_left(out: Path, name: str) -> None:
    """A problem's samples are written before its tree, so only one of the files can end in the middle."""
    config = config_of(str(out), 3)
    write(EvaluationFolder(config, PROMPTS, "m"), range(3))
    whole = {file: (out / file).read_bytes() for file in ("trees.jsonl", "samples.jsonl")}
    ends = [index + 1 for index, byte in enumerate(whole["trees.jsonl"]) if byte == ord("\n")]
    starts = [
        index
        for index in range(len(whole["samples.jsonl"]))
        if whole["samples.jsonl"].startswith(b"\n", index)
    ]
    if name == "trees.jsonl":
        cuts = [
            (cut, len(whole["samples.jsonl"]))
            for cut in (0, 1, ends[0] - 1, ends[0], ends[1] + 7, ends[2] - 1)
        ]
    else:  # killed while the third problem's samples were written
        cuts = [(ends[1], cut) for cut in (starts[5] + 1, starts[5] + 9, starts[6] + 1, starts[8])]
    for trees, samples in cuts:
        (out / "trees.jsonl").write_bytes(whole["trees.jsonl"][:trees])
        (out / "samples.jsonl").write_bytes(whole["samples.jsonl"][:samples])
        again = EvaluationFolder(config, PROMPTS, "m")
        finished = sum(end <= trees for end in ends)
        assert list(again.results) == [f"b:{index}" for index in range(finished)]
        assert [row["problem"] for row in lines(out / "samples.jsonl")] == [
            f"b:{index}" for index in range(finished) for _ in range(3)
        ]
        write(again, range(finished, 3))
        assert (out / "samples.jsonl").read_bytes() == whole["samples.jsonl"]
        assert len(lines(out / "trees.jsonl")) == 3


def test_another_configuration_is_refused_and_its_first_key_named(out: Path) -> None:
    write(EvaluationFolder(config_of(str(out), 3), PROMPTS, "m"), range(1))
    with pytest.raises(ConfigError, match=r"with sampling\.width = 3, not 4; --force"):
        EvaluationFolder(config_of(str(out), 4), PROMPTS, "m")
    with pytest.raises(ConfigError, match=r"data\.benchmarks\.1\.path = None, not c\.jsonl"):
        EvaluationFolder(config_of(str(out), 3, ("b", "c")), PROMPTS, "m")
    faster = config_of(str(out), 3, engine={"count": 4}, reward={"workers": 9})
    assert list(EvaluationFolder(faster, PROMPTS, "m").results) == ["b:0"], "the engine section may change"


def test_starting_anew_sets_the_old_files_aside(out: Path) -> None:
    write(EvaluationFolder(config_of(str(out), 3), PROMPTS, "m"), range(1))
    before = (out / "trees.jsonl").read_bytes()
    anew = EvaluationFolder(config_of(str(out), 4), PROMPTS, "m", anew=True)
    assert not anew.results
    assert (out / "previous-1" / "trees.jsonl").read_bytes() == before


def test_changed_problems_are_refused(out: Path) -> None:
    config = config_of(str(out), 3)
    write(EvaluationFolder(config, PROMPTS, "m"), range(2))
    for change in ({"tokens": np.array([9], dtype=np.int32)}, {"answer": "3"}):
        changed = PROMPTS | {"b:1": replace(PROMPTS["b:1"], **change)}
        with pytest.raises(ConfigError, match="problem b:1 with another prompt or answer"):
            EvaluationFolder(config, changed, "m")


def test_damaged_files_are_named_with_their_line(out: Path) -> None:
    config = config_of(str(out), 3)
    write(EvaluationFolder(config, PROMPTS, "m"), range(3))
    trees, samples = out / "trees.jsonl", out / "samples.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"samples\.jsonl: 2 lines of problem b:0, which has 3"):
        EvaluationFolder(config, PROMPTS, "m")
    samples.write_bytes(whole)
    rows = trees.read_bytes().splitlines(keepends=True)
    foreign = rows[1].replace(b'"spent":{', b'"spent":{"other":1,')
    for line in (
        b"{}\n",
        b"[" * 5000 + b"\n",
        foreign,
        rows[1].replace(b'"log_probs":[', b'"log_probs":[1e300,'),
    ):
        trees.write_bytes(rows[0] + line + rows[2])
        with pytest.raises(DataError, match=r"trees\.jsonl:2: not a line of an evaluation"):
            EvaluationFolder(config, PROMPTS, "m")


@pytest.mark.parametrize("content", [None, "steps: 3\n"])
def test_a_folder_of_something_else_is_not_touched(out: Path, content: str | None) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    if content is not None:
        (out / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"but not of a run|holds no evaluation"):
        EvaluationFolder(config_of(str(out), 3), PROMPTS, "m")
    assert (out / "thesis.tex").read_text() == "x"


def test_other_weights_are_refused(out: Path) -> None:
    config = config_of(str(out), 3)
    write(EvaluationFolder(config, PROMPTS, "m"), range(1))
    with pytest.raises(ConfigError, match="other weights than the model has now"):
        EvaluationFolder(config, PROMPTS, "n")
