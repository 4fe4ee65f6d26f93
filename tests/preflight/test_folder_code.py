"""Code that a model folder brings (`auto_map`) is never run, and nobody is asked whether to run it."""

import io
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.model_folders import Change, config, text
from tests.support.preflight_commands import COMMANDS, ENGINES, evaluate, rollout, run
from treepo.data.tokenizer import load_tokenizer
from treepo.errors import ModelError, TreepoError

MARK = "code-ran"
CODE = f"""
from pathlib import Path
Path({MARK!r}).touch()
from transformers import MistralConfig, PreTrainedTokenizerFast
class Own(MistralConfig):
    model_type = "of_my_own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own"}
OWN_CODE: dict[str, tuple[Change, str | None]] = {
    "a family of its own": (
        config(model_type="of_my_own", auto_map=OWN),
        r'model/config\.json: model_type = "of_my_own" is (not supported|known to neither .* is never run)',
    ),
    "a class of its own": (
        config(architectures=["OwnForCausalLM"], auto_map=OWN),
        r'architectures = \["OwnForCausalLM"\]; it must be \["Qwen2ForCausalLM"\]',
    ),
    "a tokenizer of its own": (
        config(
            "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
        ),
        None,
    ),
    "code that its family does not need": (config(auto_map=OWN), None),
}


@pytest.mark.parametrize("stdin", ["yes", "closed"])
@pytest.mark.parametrize("case", OWN_CODE)
def test_code_of_the_folder_is_never_run_and_nobody_is_asked(
    folder: Path, case: str, stdin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = OWN_CODE[case]
    change(folder)
    text("own.py", CODE)(folder)
    for command in COMMANDS if said else ENGINES:
        answers = io.StringIO("y\n" * 9)
        if stdin == "closed":
            answers.close()
        monkeypatch.setattr(sys, "stdin", answers)
        if said is None:
            run(command)
        else:
            with pytest.raises(TreepoError, match=said):
                run(command)
        assert stdin == "closed" or answers.tell() == 0, "nobody reads the answer"
        assert not Path(MARK).exists(), "the folder's code was not touched"
        assert not any("own" in name.split(".") for name in sys.modules)
    assert "[y/N]" not in "".join(capsys.readouterr())


def test_a_class_of_its_own_in_an_engines_family(olmo2: Path) -> None:
    text("own.py", CODE)(olmo2)
    config(architectures=["OwnForCausalLM"], auto_map=OWN)(olmo2)
    for command in (rollout, evaluate):
        with pytest.raises(
            TreepoError, match=r"OwnForCausalLM.* is no class of transformers; .* is never run"
        ):
            run(command)
    assert not Path(MARK).exists()


@pytest.mark.parametrize("case", OWN_CODE)
def test_a_tokenizer_alone_runs_no_code_either(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a server's model, of which the tokenizer's folder alone is here."""
    OWN_CODE[case][0](folder)
    OWN_CODE["a tokenizer of its own"][0](folder)
    text("own.py", CODE)(folder)
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    with suppress(ModelError):
        load_tokenizer(folder)
    assert answers.tell() == 0
    assert not Path(MARK).exists()
