"""Everything that a run reads and checks before anything is started, the cheapest checks first."""

from collections.abc import Sequence
from dataclasses import dataclass

from treepo.config.run import RunConfig
from treepo.data.prompts import DataReport, Prompt, PromptSet, check_prompts, load_prompts
from treepo.data.tokenizer import Tokenizer, check_model_folder, load_tokenizer
from treepo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Inputs:
    """heldout: empty where the configuration names none. reports: what the files hold."""

    tokenizer: Tokenizer
    train: PromptSet
    heldout: Sequence[Prompt]
    reports: Sequence[DataReport] = ()


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
    reports = [train.report]
    if len(train) < data.prompts_per_step:
        raise ConfigError(
            f"data.prompts_per_step = {data.prompts_per_step}, but {data.train} has {len(train)} usable rows"
        )
    heldout: Sequence[Prompt] = ()
    if data.heldout is not None:
        prompts = load_prompts(data.heldout, data.heldout_columns, tokenizer, data)
        reports.append(prompts.report)
        heldout = list(prompts[: config.evaluation.max_problems])
    return Inputs(tokenizer, train, heldout, reports)


def _check_model(config: RunConfig) -> None:
    # Seconds: torch, transformers.
    from megatron_bridge.architecture import check_layers, check_layout, read_architecture
    from sglang_rollout.preflight import check_engine

    # Evaluation samples sequentially, so `max_depth` is no bound.
    prompt, response = config.data.max_prompt_tokens, config.sampling.max_response_tokens
    check_engine(config.model.path, prompt, response, config.engine)
    check_layout(read_architecture(config.model.path), config.trainer.parallel)
    check_layers(config.trainer.transformer_impl)
