"""SGLang's processes never run code that a model folder brings."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

pytestmark = pytest.mark.slow  # imports SGLang


def resolve(folder: Path, arguments: dict[str, Any]) -> None:
    """Let SGLang find the class of a model whose architecture it does not know."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.utils import resolve_transformers_arch

    model = ModelConfig(
        model_path=str(folder),
        trust_remote_code=arguments["trust_remote_code"],
        model_override_args=arguments["json_model_override_args"],
    )
    resolve_transformers_arch(model, model.hf_config.architectures)


def test_an_architecture_of_the_folders_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_rollout.arguments import sglang_arguments
    from treepo.config.engine import EngineConfig

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    MistralConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64).save_pretrained(folder)
    (folder / "own.py").write_text("from pathlib import Path\nPath('code-ran').touch()\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))

    arguments = sglang_arguments(folder, "float32", EngineConfig(), seed=0)
    with pytest.raises(ValueError, match="OwnForCausalLM"):
        resolve(folder, arguments)
    assert not Path("code-ran").exists()
    # Without our argument SGLang 0.5.16 runs the code although it is not trusted. If this fails, it may go.
    resolve(folder, arguments | {"json_model_override_args": "{}"})
    assert Path("code-ran").exists()
