"""Everything that a rollout reads and checks before anything is started, the cheapest checks first."""

from dataclasses import dataclass

from sglang_rollout.preflight import check_engine
from treepo.config.rollout import RolloutConfig
from treepo.data.prompts import PromptSet, check_prompts, load_prompts
from treepo.data.tokenizer import Tokenizer, check_model_folder, load_tokenizer


@dataclass(frozen=True, slots=True)
class Inputs:
    tokenizer: Tokenizer
    prompts: PromptSet


def read_inputs(config: RolloutConfig) -> Inputs:
    """Raises ConfigError, DataError or ModelError: one line about what is wrong, and where."""
    data = config.data
    check_model_folder(config.model.path)
    check_engine(config.model.path, data.max_prompt_tokens, config.sampling.longest_response, config.engine)
    check_prompts(data.prompts, data.columns, data)
    tokenizer = load_tokenizer(config.model.path)
    prompts = load_prompts(data.prompts, data.columns, tokenizer, data)
    return Inputs(tokenizer, prompts[: config.max_prompts])
