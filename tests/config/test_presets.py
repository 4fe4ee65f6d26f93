"""The presets lie over any file, and the paper's is what the paper's run has."""

from pathlib import Path

import pytest

from treepo.config.load import load_config
from treepo.config.run import RunConfig

EXAMPLES = Path("examples").resolve()
PAPER = EXAMPLES / "paper" / "treepo-qwen2.5-7b.yaml"
PRESETS = sorted((EXAMPLES / "presets").glob("*.yaml"))


def laid_over(file: Path, preset: Path, folder: Path) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(f"extends: [{file}, {preset}]\n")
    return load_config(path)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "file", [*sorted((EXAMPLES / "models").glob("*.yaml")), PAPER], ids=lambda path: path.stem
)
def test_a_preset_lies_over_a_file(file: Path, preset: Path, tmp_path: Path) -> None:
    config, alone = laid_over(file, preset, tmp_path), load_config(file)
    assert config.model_copy(update={"sampling": alone.sampling, "learning": alone.learning}) == alone


def test_the_paper_s_preset_changes_nothing_of_the_paper_s_run(tmp_path: Path) -> None:
    assert laid_over(PAPER, EXAMPLES / "presets" / "paper.yaml", tmp_path) == load_config(PAPER)


def test_the_paper_s_preset_undoes_the_others(tmp_path: Path) -> None:
    others = [preset for preset in PRESETS if preset.stem != "paper"]
    (tmp_path / "others.yaml").write_text(f"extends: [{', '.join(map(str, [PAPER, *others]))}]\n")
    config = laid_over(tmp_path / "others.yaml", EXAMPLES / "presets" / "paper.yaml", tmp_path)
    assert config == load_config(PAPER)
