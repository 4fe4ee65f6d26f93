"""Everything that a rollout reads and checks before anything is started, the cheapest checks first."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_rollout.growing_tree import longest_response
from sglang_rollout.tensor_parallel import check_tensor
from sglang_rollout.weights import checkpoint_shapes
from treepo.config.rollout import RolloutConfig
from treepo.data import Prompt, check_prompts, load_prompts
from treepo.errors import ConfigError
from treepo.tokenizer import Tokenizer, check_model_folder, load_tokenizer


@dataclass(frozen=True, slots=True)
class Inputs:
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]


def read_inputs(config: RolloutConfig) -> Inputs:
    """Raises ConfigError, DataError or ModelError: one line about what is wrong, and where."""
    data = config.data
    check_model_folder(config.model.path)
    _check_model(config)
    check_prompts(data.train, data.columns, data)
    tokenizer = load_tokenizer(config.model.path)
    prompts = load_prompts(data.train, data.columns, tokenizer, data)
    return Inputs(tokenizer, prompts[: config.max_prompts])


def _check_model(config: RolloutConfig) -> None:
    """Any family that SGLang knows may sample, so only weights' headers and lengths are looked at."""
    folder = config.model.path
    checkpoint_shapes(folder)
    check_tensor(folder, config.engine.tensor)
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    prompt, response = config.data.max_prompt_tokens, longest_response(config.sampling)
    if positions is not None and prompt + response > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + the longest response = {prompt} + {response} = {prompt + response}, "
            f"but {folder} has {positions} positions (max_position_embeddings in config.json)"
        )
