"""A model folder of somebody else's: weights that are pickles, an index that leads elsewhere, a template that
looks for a way out.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.model_folders import text
from tests.support.preflight_commands import ENGINES, run
from treepo.data.tokenizer import load_tokenizer
from treepo.errors import TreepoError

MARK = "code-ran"


class Runs:
    """Unpickling it touches a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (Path(MARK),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf"])
@pytest.mark.parametrize("alone", [True, False])
def test_only_safetensors_are_read(folder: Path, name: str, alone: bool) -> None:
    (folder / name).write_bytes(pickle.dumps(Runs()))
    if alone:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    for command in ENGINES:
        if alone:
            with pytest.raises(TreepoError, match=rf"{name} must be saved as safetensors first"):
                run(command)
        else:
            run(command)
    assert not Path(MARK).exists()


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors"])
def test_an_index_names_files_of_its_folder(folder: Path, file: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = {"weight_map": {"model.embed_tokens.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in ENGINES:
        with pytest.raises(TreepoError, match=r"weight_map has .* a \*\.safetensors of the folder is needed"):
            run(command)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch code-ran') }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('code-ran', 'w') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(folder: Path, template: str) -> None:
    text("chat_template.jinja", template)(folder)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(TreepoError, match="template"):
        tokenizer.render([{"role": "user", "content": "what?"}])
    assert not Path(MARK).exists()
