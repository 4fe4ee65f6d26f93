"""What the actor reads of a model's config, and what it refuses before anything is started."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bridge.architecture import check_layout, read_architecture
from treepo.config.actor import ParallelConfig
from treepo.errors import ConfigError, ModelError


def edited(tiny_model: Path, folder: Path, **changes: object) -> Path:
    config = json.loads((tiny_model / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sizes(tiny_model: Path) -> None:
    architecture = read_architecture(tiny_model)
    assert (architecture.hidden, architecture.heads, architecture.dimensions.groups) == (64, 4, 2)
    assert architecture.dimensions.head_dim == 16
    assert architecture.frequency.shape == (8,)
    assert not architecture.tied


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tiny_model: Path, tmp_path: Path, changes, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_architecture(edited(tiny_model, tmp_path, **changes))


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "arithmetic"),
    [
        ({"tensor": 3}, "actor.parallel.tensor = 3 does not divide the model's 4 attention heads"),
        ({"tensor": 4}, "actor.parallel.tensor = 4 does not divide the model's 2 key-value heads"),
        ({"pipeline": 3}, "actor.parallel.pipeline = 3 does not divide the model's 2 layers"),
    ],
)
def test_a_layout_that_does_not_divide_shows_the_arithmetic(
    tiny_model: Path, layout: dict[str, Any], arithmetic: str
) -> None:
    with pytest.raises(ConfigError, match=arithmetic):
        check_layout(read_architecture(tiny_model), ParallelConfig(**layout))
