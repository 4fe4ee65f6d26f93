"""The checks of a weight sync that need no engine: names, shapes, and a folder's tensors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_rollout.weight_update import check_manifest, check_names, checkpoint_shapes
from treepo.errors import EngineError, ModelError
from treepo.weight_sync.wire import TensorInfo


def test_arrived_names_must_be_the_expected_ones_each_once() -> None:
    check_names(["b", "a"], ["a", "b"], "the model's")
    with pytest.raises(EngineError, match=r"the model's 3 tensors .*2 missing: a, c"):
        check_names(["b"], ["a", "b", "c"], "the model's")
    with pytest.raises(EngineError, match=r"1 unexpected: x; 1 repeated: a"):
        check_names(["a", "x", "a"], ["a"], "the model's")
    with pytest.raises(EngineError, match=r"9 missing: 0, 1, 2, 3, 4 and 4 more$"):
        check_names([], [str(n) for n in range(9)], "the model's")


def test_a_manifest_must_be_the_models_own(tmp_path: Path) -> None:
    shapes = {"a": (2, 3), "b": (4,), "lm_head.weight": (4,), "model.rotary_emb.inv_freq": (3,)}
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    shapes = checkpoint_shapes(tmp_path)
    assert shapes == {"a": (2, 3), "b": (4,)}, "neither a tied output layer nor a buffer is updated"
    a, b = TensorInfo("a", "float32", (2, 3)), TensorInfo("b", "float32", (4,))
    check_manifest((b, a), shapes)
    with pytest.raises(EngineError, match="1 missing: b"):
        check_manifest((a,), shapes)
    with pytest.raises(EngineError, match=r"a has shape \(3, 2\), the model's is \(2, 3\)"):
        check_manifest((replace(a, shape=(3, 2)), b), shapes)


def test_a_folder_without_weights_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        checkpoint_shapes(tmp_path)
