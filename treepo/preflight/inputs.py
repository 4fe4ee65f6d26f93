"""Everything that an evaluation reads and checks before anything is started, the cheapest checks first."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_rollout.remote import server_facts
from sglang_rollout.weights import checkpoint_shapes
from treepo.config.evaluate import BenchmarkConfig, EvalConfig
from treepo.data.fingerprint import model_fingerprint
from treepo.data.prompts import DataReport, Prompt, check_prompts, load_prompts
from treepo.data.tokenizer import Tokenizer, check_model_folder, load_tokenizer
from treepo.errors import ConfigError
from treepo.rollout.growing_tree import longest_response


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A file's problems; their ids are `name:row`."""

    config: BenchmarkConfig
    prompts: tuple[Prompt, ...]
    report: DataReport


@dataclass(frozen=True, slots=True)
class Inputs:
    """model: tells one model from another, whatever its path. kv_tokens: of the server, where it tells."""

    tokenizer: Tokenizer
    benchmarks: tuple[Benchmark, ...]
    model: str
    kv_tokens: int | None = None

    @property
    def prompts(self) -> dict[str, Prompt]:
        """All problems by their id, in order."""
        return {prompt.id: prompt for benchmark in self.benchmarks for prompt in benchmark.prompts}


def read_inputs(config: EvalConfig) -> Inputs:
    """Raises ConfigError, DataError, ModelError or EngineError: one line about what is wrong, and where."""
    if config.model.path is not None:
        check_model_folder(config.model.path)
    for benchmark in config.data.benchmarks:
        check_prompts(benchmark.path, benchmark.columns, config.data.prompts())
    if config.model.path is not None:
        folder, facts = config.model.path, {}
        checkpoint_shapes(folder)
        model = model_fingerprint(folder)
        positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    else:
        assert config.model.url is not None
        facts = asyncio.run(server_facts(config.model.url))
        folder = config.model.tokenizer or _tokenizer_folder(config.model.url, facts)
        positions = facts.get("max_req_input_len")
        model = f"{facts.get('model_path')} {facts.get('weight_version')}"
    _check_lengths(config, positions)
    tokenizer = load_tokenizer(folder)
    if not config.data.chat_template:
        tokenizer.hugging_face.chat_template = None
    benchmarks = tuple(_benchmark(config, benchmark, tokenizer) for benchmark in config.data.benchmarks)
    return Inputs(tokenizer, benchmarks, model, facts.get("max_total_num_tokens"))


def _benchmark(config: EvalConfig, benchmark: BenchmarkConfig, tokenizer: Tokenizer) -> Benchmark:
    loaded = load_prompts(benchmark.path, benchmark.columns, tokenizer, config.data.prompts())
    wanted = loaded[: benchmark.max_problems or config.data.max_problems]
    prompts = (replace(prompt, id=f"{benchmark.label}:{prompt.id.rpartition(':')[2]}") for prompt in wanted)
    return Benchmark(benchmark, tuple(prompts), loaded.report)


def _tokenizer_folder(url: str, facts: Mapping[str, Any]) -> Path:
    path = facts.get("tokenizer_path") or facts.get("model_path")
    if path is None or not Path(path).is_dir():
        raise ConfigError(
            f"model.url = {url}: the folder of its tokenizer, {path}, is not on this machine; --tokenizer "
            "(model.tokenizer) names one that is"
        )
    return Path(path)


def _check_lengths(config: EvalConfig, positions: int | None) -> None:
    prompt, response = config.data.max_prompt_tokens, longest_response(config.sampling)
    if positions is not None and prompt + response > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + the longest response = {prompt} + {response} = {prompt + response}, "
            f"but {config.model.path or config.model.url} takes {positions} tokens in all; lower "
            "data.max_prompt_tokens (--max-prompt-tokens) or sampling.max_response_tokens (--max-tokens)"
        )
