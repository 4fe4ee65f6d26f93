"""The command line as a user meets it: a process, its exit code, its output."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from treepo.cli.main import app, exit_code_of
from treepo.toy.make import ToyReport
from treepo.toy.recipe import Recipe

QUICKSTART = ROOT / "examples/quickstart.yaml"
MODULES_TOO_HEAVY = ("torch", "ray", "transformers", "sglang", "megatron")


def _treepo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from treepo.cli.main import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def _exit_code_here(*arguments: str) -> object:
    """The exit code of the same command in this process, whose handling of signals stays as it was."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        return exit_code_of(lambda: app(args=arguments))
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_help_names_the_commands() -> None:
    result = _treepo("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("toy", "train"))


def test_help_and_configuration_import_nothing_heavy() -> None:
    program = (
        "import sys, treepo.cli.main, treepo.config.load\n"
        f"print([name for name in {MODULES_TOO_HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none.yaml"), "none.yaml: No such file"),
        (("trian",), "No such command 'trian'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = _treepo(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "Missing argument"),
        (("toy", "--sed", "1"), "No such option"),
        (("launch", str(QUICKSTART), "--nodes", "2"), "--nodes 2, but neither Slurm"),
    ],
)
def test_other_mistakes_are_seen_in_the_same_way(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code_here(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "folder", "experts"),
    [
        ((), "runs/toy", 0),
        (("--moe",), "runs/toy-moe", 8),
        (("--moe", "--out", "elsewhere"), "elsewhere", 8),
    ],
)
def test_toy_makes_a_mixture_if_asked(
    arguments: tuple[str, ...],
    folder: str,
    experts: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[tuple[Path, Recipe]] = []

    def make(out: Path, *, recipe: Recipe, **_: object) -> ToyReport:
        made.append((out, recipe))
        return ToyReport(out / "model", out / "train", out / "heldout", recipe.family, 1, 0.4, 1.0, False)

    monkeypatch.setattr("treepo.toy.make.make_toy", make)
    assert _exit_code_here("toy", *arguments) == 0
    [(out, recipe)] = made
    assert (out, recipe.experts) == (Path(folder), experts)
    assert recipe.family.split(",")[0] in capsys.readouterr().out
