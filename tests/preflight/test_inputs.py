"""One preflight for every command that starts engines: a model that SGLang cannot serve is refused by all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import POSITIONS
from tests.support.preflight_commands import ENGINES, RESPONSE, run
from tests.support.tiny import write_tiny_qwen3_moe
from treepo.errors import TreepoError

KEPT_FREE = 6
FITS = POSITIONS - KEPT_FREE - RESPONSE


@pytest.mark.parametrize("command", ENGINES)
def test_every_command_makes_the_same_checks(command: Callable[..., Any], folder: Path) -> None:
    run(command)
    run(command, FITS)
    with pytest.raises(
        TreepoError, match=rf"of which SGLang keeps {KEPT_FREE} free: {POSITIONS - KEPT_FREE} are"
    ):
        run(command, FITS + 1)
    with pytest.raises(TreepoError, match=r"engine\.max_total_tokens = 290, of which SGLang keeps"):
        run(command, max_total_tokens=290)
    with pytest.raises(TreepoError, match=r"engine\.tensor = 3: model has \d+ attention heads"):
        run(command, tensor=3)
    write_tiny_qwen3_moe(folder, vocab_size=512)  # with a dense layer
    with pytest.raises(TreepoError, match=r"mlp_only_layers = \[1\] in config\.json; SGLang serves"):
        run(command)
