"""What a failed run keeps of Ray's logs, and what its error then names."""

import logging
import shutil
from pathlib import Path

import pytest

from treepo.cluster import ray_logs
from treepo.cluster.ray_logs import kept_after_failure
from treepo.errors import DeadEngineError, PlacementError, TrainerMemoryError


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ray's logs in a private folder, with those of one worker."""
    folder = tmp_path / "treepo-abcdefgh" / "r" / "session" / "logs"
    folder.mkdir(parents=True)
    (folder / "worker-ab-1.err").write_text("its last words")
    monkeypatch.setattr(ray_logs, "log_folder", lambda: folder)
    return folder


def fail(out: Path | None, error: BaseException) -> None:
    with kept_after_failure(out):
        raise error


def test_the_error_names_the_copy(tmp_path: Path, logs: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    caplog.set_level(logging.INFO)
    for _ in range(2):  # a second failure replaces the first one's logs
        dead = DeadEngineError(f"engine 0: it died ({logs}/worker-ab-1.err)")
        with pytest.raises(ExceptionGroup) as caught:
            fail(out, ExceptionGroup("several", [dead, KeyError(3)]))
        said = str(caught.value.exceptions[0])
        kept = out / "ray_logs" / "worker-ab-1.err"
        assert said == f"engine 0: it died ({kept})"
        assert kept.read_text() == "its last words"
        assert f"Ray's logs, of {logs}, are in {out}/ray_logs" in caplog.text


def test_a_run_that_did_not_fail_keeps_none(tmp_path: Path, logs: Path) -> None:
    assert logs.exists()
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "run", KeyboardInterrupt())
    with kept_after_failure(tmp_path / "run"):
        pass
    with pytest.raises(PlacementError):
        fail(tmp_path / "run", PlacementError("it does not fit"))
    assert not (tmp_path / "run").exists()


def test_logs_that_outlive_the_run_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "ray" / "logs"
    theirs.mkdir(parents=True)
    monkeypatch.setattr(ray_logs, "log_folder", lambda: theirs)
    with pytest.raises(DeadEngineError, match=str(theirs)):
        fail(tmp_path / "run", DeadEngineError(f"({theirs}/worker-ab-1.err)"))
    assert not (tmp_path / "run").exists()


def test_a_disk_that_cannot_hold_them(tmp_path: Path, logs: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(DeadEngineError, match=str(logs)):
        fail(tmp_path / "run", DeadEngineError(f"({logs}/worker-ab-1.err)"))
    assert "Ray's logs cannot be kept in" in caplog.text


def test_a_trainer_without_memory_left_a_log(tmp_path: Path, logs: Path) -> None:
    """Its exit code is that of bad input."""
    with pytest.raises(TrainerMemoryError, match=f"{tmp_path}/run/ray_logs/worker"):
        fail(tmp_path / "run", TrainerMemoryError(f"rank 0 died ({logs}/worker-ab-1.err)"))


def test_a_copy_that_ends_half_way_is_removed(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def copy(source: Path, target: Path, **_: object) -> None:
        target.mkdir(parents=True)
        raise shutil.Error([(f"{source}/{number}", f"{target}/{number}", "no space") for number in range(99)])

    monkeypatch.setattr(shutil, "copytree", copy)
    with pytest.raises(DeadEngineError, match=str(logs)):
        fail(tmp_path / "run", DeadEngineError(f"({logs}/worker-ab-1.err)"))
    assert not (tmp_path / "run" / "ray_logs").exists()
    assert len(caplog.messages[-1]) < 600
