"""Files of a run that are not whole: each damage is one line."""

from dataclasses import asdict
from pathlib import Path

import pytest

from treepo.errors import DataError
from treepo.training.run_folder import read_metrics
from treepo.training.run_state import RunState


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1000000000000000000000000000000, "time": 1.0}',
        b'{"step": 1, "time": 1e999}',
        b'{"step": 1, "time": null}',
        b'{"step": true, "time": 1.0}',
        b'{"step": 1, "time": 1.0, "\\ud800": 1.0}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_numbers_that_no_run_writes_are_one_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "time": 1, "reward": null}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not") as caught:
        list(read_metrics(path))
    assert "\n" not in str(caught.value)


def test_a_state_without_growing_files_is_a_state() -> None:
    assert RunState.of_manifest(asdict(RunState("d", 3))).steps_done == 3


def test_a_key_of_any_length_is_named_in_one_line() -> None:
    with pytest.raises(ValueError, match="Unexpected") as caught:
        RunState.of_manifest({"data": "d", "x\ny" * 1000: 1})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
