"""What a trainer writes into a manifest can be read again."""

from pathlib import Path

from treepo.config.trainer import ParallelConfig
from treepo.training.checkpoint_manifest import HUGGING_FACE, TRAINER, CheckpointManifest, read_manifest


def test_a_trainers_layout_comes_back(tmp_path: Path) -> None:
    """It has numbers of ranks and a switch, `sequence`."""
    for name in (TRAINER, HUGGING_FACE):
        (tmp_path / name).mkdir()
    layout = ParallelConfig(tensor=2, sequence=False).model_dump()
    CheckpointManifest("bfloat16", True, 3, layout, {"step": 1}).write(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.layout == layout
    assert manifest.optimizer_steps == 3
