"""The terminal output of `treepo train` at its end."""

from io import StringIO
from pathlib import Path

from treepo.display.safe_console import SafeConsole
from treepo.display.train import show_summary

SUMMARY = {
    "dtype": "float32",
    "accuracy_before": None,
    "accuracy_after": None,
    "best": None,
    "decoded_tokens": 10,
    "sequential_tokens": 20,
    "log_prob_check": None,
    "max_logprob_difference": 0.0,
    "phase_seconds": {"sample": 1.0},
    "seconds": 2.0,
}


def test_only_files_that_the_run_has_written_are_listed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    output = StringIO()
    show_summary(SafeConsole(file=output, width=200), SUMMARY, tmp_path)
    assert "metrics.jsonl" in output.getvalue()
    assert "tensorboard" not in output.getvalue()
    (tmp_path / "tensorboard").mkdir()
    show_summary(SafeConsole(file=output, width=200), SUMMARY, tmp_path)
    assert "tensorboard --logdir" in output.getvalue()
