"""What the tab "Run" says about the files of a run."""

import json
import random
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.evaluations import config_of, document, graded_problem, prompt_of
from tests.support.paths import ROOT
from tests.support.run_folders import step, write_run_folder
from treepo.errors import DataError, TreepoError
from treepo.training.metric_table import METRICS
from treepo.tree import Verdict
from treepo.view.log_lines import events, log_entries
from treepo.view.metrics_table import metrics_table
from treepo.view.part import json_text
from treepo.view.run import log, metrics, result, run_part, settings, state
from treepo.view.sources import find_sources


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "run")


def test_metrics_are_columns_and_an_evaluation_is_in_the_row_of_its_step(run: Path) -> None:
    table = metrics(run)
    assert table["steps"] == [1, 2]
    assert table["times"] == [1010.0, 1020.0]
    assert table["columns"]["reward"] == [0.1, 0.2]
    assert table["columns"]["heldout/accuracy"] == [0.5, None]


def test_known_metrics_have_a_meaning_without_markup(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(3, **{"leaves": 2.0, "grader/mine": 1.0, "unknown": 1.0})) + "\n")
    meanings = metrics(run)["meanings"]
    assert meanings["leaves"] == "leaves of the step's trees\nhealthy: trees × sampling.width"
    assert meanings["grader/mine"] == "mean of a further number that your reward function returned"
    assert "unknown" not in meanings


def test_every_metric_that_a_chart_names_is_one_of_a_run() -> None:
    script = (ROOT / "treepo/view/page/run-lines.js").read_text(encoding="utf-8")
    named = [
        name for names in re.findall(r"names: \[(.*?)\]", script) for name in re.findall(r'"(.*?)"', names)
    ]
    assert len(named) > 10
    assert [name for name in named if name not in METRICS] == []


def test_the_line_that_is_being_written_is_left_out(run: Path) -> None:
    path = run / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(step(3))[:20])
    assert metrics_table(path)["steps"] == [1, 2]


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"step": "1", "time": 0}', '{"step": 1, "time": 0, "a": "x"}', "{"]
)
def test_a_line_that_no_run_writes_is_an_error_with_its_place(run: Path, line: str) -> None:
    path = run / "metrics.jsonl"
    path.write_text(f"{json.dumps(step(1))}\n{line}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not"):
        metrics_table(path)


def test_a_log_has_entries_with_times_and_their_tracebacks(run: Path) -> None:
    entries = log_entries(run / "log.txt")
    assert [entry.level for entry in entries] == ["INFO", "WARNING", "ERROR", "INFO"]
    assert entries[1].time == datetime(2026, 1, 2, 3, 4, 6, 500_000).timestamp()
    assert entries[2].text.splitlines()[1:] == ["Traceback (most recent call last):", "ValueError: no"]


def test_events_are_warnings_errors_and_continuations(run: Path) -> None:
    texts = [entry.text.splitlines()[0] for entry in events(log_entries(run / "log.txt"))]
    assert texts == ["engine 0 is restarted: it died", "the run ended early", "continues after step 1"]


def test_a_long_log_is_read_from_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = log_entries(run / "log.txt")
    size = (run / "log.txt").stat().st_size
    for most in range(1, size):
        monkeypatch.setattr("treepo.view.log_lines._MOST_BYTES", most)
        entries = log_entries(run / "log.txt")
        assert entries == whole[len(whole) - len(entries) :]


def test_the_state_changes_with_the_files_and_names_what_is_waited_for(run: Path) -> None:
    before = state(run)
    assert before == state(run)
    assert before["status"]["state"] == "finished"
    assert before["status"]["waits"] == ["step 3 waits for trees of prompts 7, 8"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(3)) + "\n")
    assert state(run)["files"] != before["files"]


def test_a_run_that_gives_no_sign_of_life_has_a_fault(run: Path) -> None:
    write_run_folder(run, state="running")
    assert "sign of life" in state(run)["status"]["fault"]


def test_settings_are_texts_by_dotted_key_without_passwords(run: Path) -> None:
    (run / "config.yaml").write_text("reward:\n  url: http://me:secret@host/x\ndata:\n  train: [a, 1.5]\n")
    expected = {"reward.url": "http://...@host/x", "data.train.0": "a", "data.train.1": "1.5"}
    assert settings(run) == expected


def test_the_result_of_a_run_is_its_summary(run: Path) -> None:
    assert result(run) == {"summary": {"steps": 2, "phase_seconds.train": 4.0}, "scores": []}


def test_the_result_of_an_evaluation_is_its_scores(tmp_path: Path) -> None:
    prompt = prompt_of("b", 0)
    problem = graded_problem(prompt, [Verdict.CORRECT, Verdict.WRONG])
    results = document(config_of("out", 2), {"b": [(prompt, problem)]})
    (tmp_path / "results.json").write_text(json.dumps(results))
    head, row = result(tmp_path)["scores"]
    assert head[:3] == ["", "problems", "mean@2"]
    assert row[:2] == ["b", "1"]
    assert row[2].startswith("50.0% (")


def test_a_folder_without_files_has_empty_answers(tmp_path: Path) -> None:
    assert metrics(tmp_path)["steps"] == []
    assert settings(tmp_path) == {}
    assert log(tmp_path) == {"entries": [], "events": []}
    assert result(tmp_path) == {"summary": {}, "scores": []}
    assert state(tmp_path) == {"files": "", "trees": False, "status": None}


@pytest.mark.parametrize("source", ["", "1", "-1", "x", "0" * 20, "²"])
def test_a_source_that_is_not_there_is_an_error(run: Path, source: str) -> None:
    part = run_part(find_sources([run]))
    assert part.answers["state"]({"source": "0"})
    with pytest.raises(DataError, match="source"):
        part.answers["state"]({"source": source})


def test_damaged_files_are_answers_or_errors_that_name_them(run: Path) -> None:
    part = run_part(find_sources([run]))
    whole = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    generator = random.Random(0)
    for path, content in whole.items():
        for _ in range(20):
            at = generator.randrange(len(content))
            piece = generator.choice([b"", b"\xff", b"{", b'"', b"1e999", b"NaN", b"\n", b"\0", b"[" * 2000])
            path.write_bytes(content[:at] + piece + content[at + generator.randrange(8) :])
            for answer in part.answers.values():
                with suppress(TreepoError):
                    json_text(answer({"source": "0"}))
        path.write_bytes(content)
