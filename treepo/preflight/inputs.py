"""Reads and checks everything that a command needs, before any engine or trainer starts.

The cheap checks come first. An error is one line: ConfigError, DataError, ModelError, or EngineError of a
running server.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treepo.config.engine import EngineConfig
from treepo.config.evaluate import BenchmarkConfig, EvalConfig
from treepo.config.heldout import HELDOUT
from treepo.config.rollout import RolloutConfig
from treepo.config.run import RunConfig
from treepo.data.fingerprint import model_fingerprint
from treepo.data.inputs import Benchmark, EvaluationInputs, RolloutInputs, TrainInputs
from treepo.data.prompts import Prompt, check_prompts, load_prompts
from treepo.data.tokenizer import Tokenizer, load_tokenizer
from treepo.errors import ConfigError
from treepo.preflight.loggers import check_loggers
from treepo.preflight.model_folder import check_files, check_served_folder
from treepo.preflight.train_files import check_train_files, load_train_files


def read_train_inputs(config: RunConfig) -> TrainInputs:
    """Read a training run's tokenizer, training prompts and held-out sets."""
    data, as_json = config.data, config.reward.url is not None
    sets = {_columns_key(name): one for name, one in config.heldout_sets.items()}
    check_loggers(config)
    check_files(config.model.path)
    check_train_files(config)
    for key, one in sets.items():
        check_prompts(one.path, one.columns, data, key=key, extra_as_json=as_json)
    check_served_folder(config.model.path, trained=True)
    # Held-out responses are sampled sequentially, so `max_depth` does not bound them.
    responses = [
        config.sampling.max_response_tokens,
        *(one.max_response_tokens or 0 for one in sets.values()),
    ]
    check_served(config.model.path, data.max_prompt_tokens, max(responses), config.engine)
    _check_trained(config)
    tokenizer = load_tokenizer(config.model.path)
    train, reports = load_train_files(config, tokenizer)
    heldout: dict[str, Sequence[Prompt]] = {}
    for (key, one), name in zip(sets.items(), config.heldout_sets, strict=True):
        prompts = load_prompts(one.path, one.columns, tokenizer, data, key=key, extra_as_json=as_json)
        reports.append(prompts.report)
        heldout[name] = list(prompts[: one.max_problems])
    return TrainInputs(tokenizer, train, heldout, reports)


def read_rollout_inputs(config: RolloutConfig) -> RolloutInputs:
    """Read a rollout's tokenizer and prompts."""
    data = config.data
    check_files(config.model.path)
    check_prompts(data.prompts, data.columns, data)
    check_served_folder(config.model.path)
    check_served(config.model.path, data.max_prompt_tokens, config.sampling.longest_response, config.engine)
    tokenizer = load_tokenizer(config.model.path)
    prompts = load_prompts(data.prompts, data.columns, tokenizer, data)
    return RolloutInputs(tokenizer, prompts[: config.max_prompts])


def read_evaluation_inputs(config: EvalConfig) -> EvaluationInputs:
    """Read an evaluation's tokenizer and problems, and ask a running server about its model."""
    data, folder, url = config.data, config.model.path, config.model.url
    if folder is not None:
        check_files(folder)
    for number, benchmark in enumerate(data.benchmarks):
        check_prompts(
            benchmark.path,
            benchmark.columns,
            data.prompts(),
            key=f"data.benchmarks.{number}.columns",
            extra_as_json=config.reward.url is not None,
        )
    prompt, response = data.max_prompt_tokens, config.sampling.longest_response
    if folder is not None:
        check_served_folder(folder)
        check_served(folder, prompt, response, config.engine)
        tokenizer, model, kv_tokens = load_tokenizer(folder), model_fingerprint(folder), None
    else:
        from sglang_rollout.http_engine import server_facts

        assert url is not None
        facts = asyncio.run(server_facts(url))
        _check_server_lengths(url, facts, prompt, response)
        if config.sampling.min_p and facts.get("enable_deterministic_inference"):
            raise ConfigError(
                f"sampling.min_p: {url} draws by seed, and SGLang then has no min_p; allowed: 0"
            )
        tokenizer = load_tokenizer(config.model.tokenizer or tokenizer_folder(url, facts))
        model = f"{facts.get('model_path')} {facts.get('weight_version')}"
        kv_tokens = facts.get("max_total_num_tokens")
    if not data.chat_template:
        tokenizer.hugging_face.chat_template = None
    benchmarks = tuple(_benchmark(config, benchmark, tokenizer) for benchmark in data.benchmarks)
    return EvaluationInputs(tokenizer, benchmarks, model, kv_tokens)


def _columns_key(name: str) -> str:
    """The configuration's key of a held-out set's columns."""
    return "data.heldout_columns" if name == HELDOUT else f"evaluation.sets.{name}.columns"


def check_served(folder: Path, prompt_tokens: int, response_tokens: int, engine: EngineConfig) -> None:
    """Check that the engine's ranks can share the model, and that the longest trajectory fits."""
    # Imported here because torch and transformers take seconds.
    from sglang_rollout.preflight import check_engine

    check_engine(folder, prompt_tokens, response_tokens, engine)


def _check_trained(config: RunConfig) -> None:
    """Check that the trainer can divide the model among its ranks, and replay its routes."""
    from megatron_bridge.architecture import (
        check_adapters,
        check_layout,
        check_routing_replay,
        check_served_adapter,
        check_transformer_impl,
        read_architecture,
    )

    architecture = read_architecture(config.model.path)
    check_layout(architecture, config.trainer.parallel)
    check_routing_replay(config.model.path, architecture, config.trainer.routing_replay)
    check_adapters(config.model.path, architecture, config.trainer.lora)
    check_served_adapter(config.model.path, architecture, config.served_lora)
    check_transformer_impl(config.trainer.transformer_impl)


def _check_server_lengths(url: str, facts: Mapping[str, Any], prompt: int, response: int) -> None:
    # SGLang has already subtracted the tokens that it keeps free.
    allowed = facts.get("max_req_input_len")
    if allowed is not None and prompt + response > allowed:
        raise ConfigError(
            f"data.max_prompt_tokens + the longest response = {prompt} + {response} = {prompt + response}, "
            f"but {url} takes {allowed} tokens in all; lower data.max_prompt_tokens (--max-prompt-tokens) or "
            "sampling.max_response_tokens (--max-tokens)"
        )


def tokenizer_folder(url: str, facts: Mapping[str, Any]) -> Path:
    path = facts.get("tokenizer_path") or facts.get("model_path")
    if path is None or not Path(path).is_dir():
        raise ConfigError(
            f"model.url = {url}: the folder of its tokenizer, {path}, is not on this machine; --tokenizer "
            "(model.tokenizer) names one that is"
        )
    return Path(path)


def _benchmark(config: EvalConfig, benchmark: BenchmarkConfig, tokenizer: Tokenizer) -> Benchmark:
    loaded = load_prompts(
        benchmark.path,
        benchmark.columns,
        tokenizer,
        config.data.prompts(),
        extra_as_json=config.reward.url is not None,
    )
    wanted = loaded[: benchmark.max_problems or config.data.max_problems]
    prompts = (replace(prompt, id=f"{benchmark.label}:{prompt.id.rpartition(':')[2]}") for prompt in wanted)
    return Benchmark(benchmark, tuple(prompts), loaded.report)
