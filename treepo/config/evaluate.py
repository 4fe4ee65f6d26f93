"""The configuration of `treepo eval`: a model or a server, benchmarks, sampling, grading.

The defaults are the paper's protocol: 16 samples at temperature 0.6, prompts of at most 2048 tokens,
responses of at most 16384. The held-out evaluation inside a training run has its own small section,
`treepo.config.heldout.HeldoutConfig`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from treepo.config.base import PathField, Section
from treepo.config.data import ColumnsConfig, PromptsConfig, shipped_columns
from treepo.config.engine import EngineConfig
from treepo.config.reward import RewardConfig
from treepo.config.sampling import RepetitionConfig, SamplingConfig, StopsConfig, untrained
from treepo.config.truncation import check_reproducible


class EvalModelConfig(Section):
    """A model folder, or a running server."""

    path: PathField | None = None
    """A Hugging Face folder, served by engines that the evaluation starts and stops."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the engines' weights. `auto`: bfloat16 on GPUs and float32 on CPUs; float32 runs on CPUs
    only."""
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/@]+(/\S*)?$")
    """A running SGLang server, for example `http://127.0.0.1:30000`, instead of `path`."""
    tokenizer: PathField | None = None
    """The folder of the server's tokenizer, needed if the model path that the server reports does not exist
    on this machine.
    """

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.path is None) == (self.url is None):
            given = (
                f"path = {self.path} and url = {self.url}" if self.path else "neither path nor url is given"
            )
            raise ValueError(f"{given}; exactly one of path and url is needed")
        if self.tokenizer is not None and self.url is None:
            raise ValueError(
                f"tokenizer = {self.tokenizer} has no effect: the model at path = {self.path} has its own; "
                "set tokenizer only with url"
            )
        return self


class BenchmarkConfig(Section):
    path: PathField
    """Problems: a .jsonl or .parquet file, or a folder of them."""
    name: str = Field(default="", pattern=r"^[\w.-]*$")
    """Its name in tables and problem ids; by default the file's name without its extension."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names of `path`. By default the map in treepo/data/columns with the file's name, or, if none has
    it, the columns of m-a-p/TreePO_data.
    """
    max_problems: int | None = Field(default=None, ge=1)
    """Evaluate only this many usable problems, from the first on; `data.max_problems` by default."""

    @model_validator(mode="before")
    @classmethod
    def _columns_by_file_name(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "columns" in value:
            return value
        stem = Path(str(value.get("path", ""))).stem
        return value | {"columns": stem} if stem in shipped_columns() else value

    @property
    def label(self) -> str:
        return self.name or self.path.stem

    @property
    def shipped_map(self) -> str | None:
        """The name of the map in treepo/data/columns that these columns are from, None if there is none."""
        stem = self.path.stem
        return (
            stem if stem in shipped_columns() and ColumnsConfig.model_validate(stem) == self.columns else None
        )


class BenchmarksConfig(Section):
    benchmarks: list[BenchmarkConfig] = Field(min_length=1)
    """The benchmarks."""
    max_problems: int | None = Field(default=None, ge=1)
    """Evaluate only this many usable problems of each benchmark, from the first on; all by default."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Maximum tokens of a prompt, chat template included."""
    system_prompt: str | None = None
    """A system message for every prompt, in place of the row's own."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. If false, or if the tokenizer has no template, a prompt is the
    text of its messages, separated by blank lines.
    """
    bad_rows: Literal["error", "skip"] = "error"
    """A row without prompt or answer, or one that is too long, is an error (`error`) or is counted and
    skipped (`skip`).
    """

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
        """The rules by which a row of any benchmark is usable."""
        return PromptsConfig(
            max_prompt_tokens=self.max_prompt_tokens,
            system_prompt=self.system_prompt,
            bad_rows=self.bad_rows,
        )


class EvalStopsConfig(StopsConfig):
    """When a path ends: by default only at the end of sequence or at a limit, as is usual in evaluations."""

    boxed: Literal["end", "with_eos", "off"] = "with_eos"
    """`with_eos`: a box does not end a response, but at the end of sequence its stop reason is `boxed`.
    `end`: a complete box ends the path at the next segment boundary. `off`: boxes are ignored.
    """
    repetition: RepetitionConfig = RepetitionConfig(check="off")
    """Detection of paths that loop; off by default."""


class EvalSamplingConfig(SamplingConfig):
    """The keys of `sampling` in training, with defaults for evaluations."""

    mode: Literal["tree", "sequential"] = "sequential"
    """`sequential`: `width` independent samples of each problem. `tree`: the `width` leaves of a tree."""
    max_depth: int = Field(default=32, ge=1)
    """Maximum segments of a path; ignored in `sequential` mode."""
    width: int = Field(default=16, ge=1)  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """Responses to each problem."""
    max_response_tokens: int = Field(default=16384, ge=1)
    """Maximum tokens of a response."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature; 0 always takes the most likely token."""
    stops: EvalStopsConfig = EvalStopsConfig()  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """When a path ends."""

    @model_validator(mode="after")
    def _greedy_once(self) -> Self:
        if self.temperature == 0 and self.most_leaves > 1:
            raise ValueError(
                f"temperature = 0 gives the same response every time, but width = {self.width} asks for "
                "several; set width = 1"
            )
        return self


class EvalEngineConfig(EngineConfig):
    """The engines that the evaluation starts."""

    count: int | None = Field(default=None, ge=1)  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    """Number of engines, each with the whole model. By default as many as fit on the GPUs, or one on the CPU.
    """

    def on(self, gpus: int) -> EngineConfig:
        """The configuration for a machine or cluster with a number of GPUs, `count` filled in."""
        count = self.count or max(gpus // self.ranks, 1)
        return EngineConfig.model_validate(self.model_dump() | {"count": count})


class EvalConfig(Section):
    out: PathField
    """The folder for results, samples, trees, report, configuration and log. An interrupted evaluation
    resumes from it.
    """
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstraps, and of sampling as far as the engine is deterministic. Any whole number
    from 0."""
    model: EvalModelConfig
    """The model to evaluate."""
    data: BenchmarksConfig
    """The benchmarks, and which of their rows are used."""
    sampling: Annotated[EvalSamplingConfig, AfterValidator(untrained)] = EvalSamplingConfig()
    """How responses are sampled; a schedule stays at its first step."""
    reward: RewardConfig = RewardConfig()
    """Grading."""
    engine: EvalEngineConfig = EvalEngineConfig()
    """The engines; for a running server only `request_seconds` is used."""

    @model_validator(mode="after")
    def _min_p_is_possible(self) -> Self:
        check_reproducible(self.sampling.min_p, self.engine)
        return self


def grades_mathematics(reward: RewardConfig) -> bool:
    """Whether math-verify grades, which extracts the answers that majority votes need."""
    return reward.function is None and reward.url is None


_KEYS = {
    "out": "out",
    "seed": "seed",
    "tokenizer": "model.tokenizer",
    "samples": "sampling.width",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "from_model": "sampling.from_model",
    "max_tokens": "sampling.max_response_tokens",
    "max_prompt_tokens": "data.max_prompt_tokens",
    "max_problems": "data.max_problems",
    "system_prompt": "data.system_prompt",
    "chat_template": "data.chat_template",
}


def overrides_of(options: Mapping[str, Any]) -> list[str]:
    """Translate the options of `treepo eval` into `a.b=c` overrides. An option that is None was not given.

    model: a folder or a URL. data: a list of files. tree: a boolean. Every other option stands for one key.
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
