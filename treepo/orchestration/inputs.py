"""Everything that a run reads and checks before anything is started, the cheapest checks first."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_rollout.tensor_parallel import check_tensor
from treepo.config.schema import RunConfig
from treepo.data import Prompt, PromptSet, check_prompts, load_prompts
from treepo.errors import ConfigError, ModelError
from treepo.tokenizer import Tokenizer, check_model_folder, load_tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """heldout: empty where the configuration names none."""

    tokenizer: Tokenizer
    train: PromptSet
    heldout: Sequence[Prompt]


def read_inputs(config: RunConfig) -> Inputs:
    """Raises ConfigError, DataError or ModelError: one line about what is wrong, and where."""
    data = config.data
    check_model_folder(config.model.path)
    check_prompts(data.train, data.columns, data)
    if data.heldout is not None:
        check_prompts(data.heldout, data.heldout_columns, data)
    _check_model(config)
    tokenizer = load_tokenizer(config.model.path)
    train = load_prompts(data.train, data.columns, tokenizer, data)
    _log.info(train.report.summary())
    if len(train) < data.prompts_per_step:
        raise ConfigError(
            f"data.prompts_per_step = {data.prompts_per_step}, but {data.train} has {len(train)} usable rows"
        )
    heldout: Sequence[Prompt] = ()
    if data.heldout is not None:
        prompts = load_prompts(data.heldout, data.heldout_columns, tokenizer, data)
        _log.info(prompts.report.summary())
        heldout = prompts[: config.evaluation.max_problems]
    return Inputs(tokenizer, train, heldout)


def _check_model(config: RunConfig) -> None:
    from megatron_bridge.architecture import check_layout, read_architecture  # seconds: torch, transformers

    folder = config.model.path
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: it has no weights (no *.safetensors)")
    architecture = read_architecture(folder)
    check_layout(architecture, config.actor.parallel)
    check_tensor(folder, config.engine.tensor)
    prompt, response = config.data.max_prompt_tokens, config.sampling.max_response_tokens
    if prompt + response > architecture.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.max_response_tokens = {prompt} + {response} = "
            f"{prompt + response}, but {folder} has {architecture.max_positions} positions "
            "(max_position_embeddings in config.json)"
        )
