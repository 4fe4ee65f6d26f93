"""What `treepo eval` needs: a model or a server, benchmarks, how to sample, how to grade.

The defaults are the paper's protocol: temperature 0.6, 16 samples, prompts of at most 2048 tokens, responses
of at most 16384.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from treepo.config.base import PathField, Section
from treepo.config.data import ColumnsConfig, PromptsConfig, shipped_columns
from treepo.config.engine import EngineConfig
from treepo.config.reward import RewardConfig
from treepo.config.sampling import RepetitionConfig, SamplingConfig, StopsConfig


class EvalModelConfig(Section):
    """A model folder, or a running server."""

    path: PathField | None = None
    """A Hugging Face folder, served by engines that the evaluation starts and ends."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of those engines' weights."""
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+(/\S*)?$")
    """A running SGLang server, for example `http://127.0.0.1:30000`, in place of `path`."""
    tokenizer: PathField | None = None
    """The folder of the server's tokenizer, where the model path that the server reports cannot be read
    here."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.path is None) == (self.url is None):
            given = (
                f"path = {self.path} and url = {self.url}" if self.path else "neither path nor url is given"
            )
            raise ValueError(f"{given}; exactly one of path and url is needed")
        if self.tokenizer is not None and self.url is None:
            raise ValueError(
                f"tokenizer = {self.tokenizer} does nothing with path = {self.path}, which has its own; "
                "url is allowed"
            )
        return self


class BenchmarkConfig(Section):
    path: PathField
    """Problems: .jsonl or .parquet."""
    name: str = Field(default="", pattern=r"^[\w.-]*$")
    """Its name in tables and problem ids; by default the file's name without its ending."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `path`. By default the map in treepo/data/columns that is named as the file is, if there is
    one, else those of m-a-p/TreePO_data."""
    max_problems: int | None = Field(default=None, ge=1)
    """Only the first so many usable problems; `data.max_problems` by default."""

    @model_validator(mode="before")
    @classmethod
    def _columns_by_file_name(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "columns" in value:
            return value
        stem = str(value.get("path", "")).rpartition("/")[2].rpartition(".")[0]
        return value | {"columns": stem} if stem in shipped_columns() else value

    @property
    def label(self) -> str:
        return self.name or self.path.stem

    @property
    def shipped_map(self) -> str | None:
        """The name of the map in treepo/data/columns that the columns are those of."""
        stem = self.path.stem
        return (
            stem if stem in shipped_columns() and ColumnsConfig.model_validate(stem) == self.columns else None
        )


class BenchmarksConfig(Section):
    benchmarks: list[BenchmarkConfig] = Field(min_length=1)
    """The files of problems."""
    max_problems: int | None = Field(default=None, ge=1)
    """Only the first so many usable problems of each; all of them by default."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Most tokens in one prompt, chat template included."""
    system_prompt: str | None = None
    """Prepended as a system message where set, in place of the row's own."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. Without it a prompt is its messages' text, one blank line between
    them, as for a tokenizer that has none."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used (no prompt, no answer, too long) ends the run, or is counted and skipped."""

    @field_validator("benchmarks")
    @classmethod
    def _different_names(cls, benchmarks: list[BenchmarkConfig]) -> list[BenchmarkConfig]:
        labels = [benchmark.label for benchmark in benchmarks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"{labels.count(label)} benchmarks are named {label!r}; give each its own name"
                )
        return benchmarks

    def prompts(self) -> PromptsConfig:
        """What makes a row of any benchmark usable."""
        return PromptsConfig(
            max_prompt_tokens=self.max_prompt_tokens,
            system_prompt=self.system_prompt,
            bad_rows=self.bad_rows,
        )


class EvalStopsConfig(StopsConfig):
    """When a path ends, as an evaluation is usually done: at the end of sequence or the limit only."""

    boxed: Literal["end", "with_eos", "off"] = "with_eos"
    """`with_eos`: only the end of sequence ends a response, and one with a box then counts as boxed. `end`: a
    complete box ends the path at the next segment boundary. `off`: boxes are not looked for."""
    repetition: RepetitionConfig = RepetitionConfig(check="off")
    """Paths that loop; not looked for by default."""


class EvalSamplingConfig(SamplingConfig):
    """The keys of training's `sampling`, with an evaluation's defaults."""

    mode: Literal["tree", "sequential"] = "sequential"
    """`sequential`: `width` independent samples of each problem; or `tree`."""
    max_depth: int = Field(default=32, ge=1)
    """Most segments on one path; not looked at in `sequential` mode."""
    width: int = Field(default=16, ge=1)
    """Samples (trajectories, leaves) of each problem."""
    max_response_tokens: int = Field(default=16384, ge=1)
    """Most tokens in one response."""
    temperature: float = Field(default=0.6, ge=0)
    """Softmax temperature of sampling; 0 takes the likeliest token each time."""
    stops: EvalStopsConfig = EvalStopsConfig()  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """When a path ends."""

    @model_validator(mode="after")
    def _greedy_once(self) -> Self:
        if self.temperature == 0 and self.width > 1:
            raise ValueError(
                f"temperature = 0 gives the same response each time, and width = {self.width} asks for "
                "several; width = 1 is allowed"
            )
        return self


class EvalEngineConfig(EngineConfig):
    """Engines of the evaluation's own."""

    count: int | None = Field(default=None, ge=1)  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """Engines; each holds the whole model. By default as many as the GPUs hold, and one without any."""

    def on(self, gpus: int) -> EngineConfig:
        """With a number of engines, on a machine or cluster with so many GPUs."""
        count = self.count or max(gpus // self.tensor, 1)
        return EngineConfig.model_validate(self.model_dump() | {"count": count})


class EvalConfig(Section):
    out: PathField
    """The folder to write to, and to go on from: results, samples, trees, report, config, log."""
    seed: int = Field(default=0, ge=0)
    """Of everything random: sampling, as far as the engine does, and bootstraps."""
    model: EvalModelConfig
    """What is evaluated."""
    data: BenchmarksConfig
    """The problems."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()
    """How each problem is answered; a schedule stands at its first step."""
    reward: RewardConfig = RewardConfig()
    """Grading."""
    engine: EvalEngineConfig = EvalEngineConfig()
    """The sampler; of a running server only `request_seconds` counts."""


def grades_mathematics(reward: RewardConfig) -> bool:
    """Whether math-verify grades, so that there are extracted answers to vote with."""
    return reward.function is None and reward.url is None


_KEYS = {
    "out": "out",
    "seed": "seed",
    "tokenizer": "model.tokenizer",
    "samples": "sampling.width",
    "temperature": "sampling.temperature",
    "max_tokens": "sampling.max_response_tokens",
    "max_prompt_tokens": "data.max_prompt_tokens",
    "max_problems": "data.max_problems",
    "system_prompt": "data.system_prompt",
    "chat_template": "data.chat_template",
}


def overrides_of(options: Mapping[str, Any]) -> list[str]:
    """The command's options as `a.b=c` overrides; those that are None were not given.

    `model` is a folder or a URL, `data` a list of files, `tree` true or false; the others stand for one key.
    """
    values: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name == "model":
            is_url = "://" in value
            values |= {"model.url": value if is_url else None, "model.path": None if is_url else value}
        elif name == "data":
            values["data.benchmarks"] = [{"path": str(path)} for path in value]
        elif name == "tree":
            values["sampling.mode"] = "tree" if value else "sequential"
        else:
            values[_KEYS[name]] = str(value) if isinstance(value, Path) else value
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML
