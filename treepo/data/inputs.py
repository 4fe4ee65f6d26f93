"""What a command has read before anything starts: the tokenizer, and the prompts of its files.

`treepo.preflight.inputs` reads and checks them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treepo.config.evaluate import BenchmarkConfig
from treepo.config.run import RunConfig
from treepo.data.mixture import PromptMixture, TrainingPrompts
from treepo.data.prompts import DataReport, Prompt, PromptSet
from treepo.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """heldout: the prompts of each held-out set, by its name. reports: one for each file."""

    tokenizer: Tokenizer
    train: TrainingPrompts
    heldout: Mapping[str, Sequence[Prompt]]
    reports: Sequence[DataReport] = ()

    def summaries(self, config: RunConfig) -> list[str]:
        """Lines for the log: each file's contents, and what the run takes from each file of a mixture."""
        lines = [report.summary() for report in self.reports]
        if isinstance(self.train, PromptMixture):
            line = self.train.summary(config.steps, config.data.prompts_per_step)
            if config.data.decoded_tokens_per_step is not None:
                line += "; more or fewer with data.decoded_tokens_per_step"
            lines.append(line)
        return lines


@dataclass(frozen=True, slots=True)
class RolloutInputs:
    tokenizer: Tokenizer
    prompts: PromptSet


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The problems of one file; their ids are `label:row`."""

    config: BenchmarkConfig
    prompts: tuple[Prompt, ...]
    report: DataReport


@dataclass(frozen=True, slots=True)
class EvaluationInputs:
    """model: identifies the weights, wherever they lie. kv_tokens: those of a running server's KV cache, if
    it reports them.
    """

    tokenizer: Tokenizer
    benchmarks: tuple[Benchmark, ...]
    model: str
    kv_tokens: int | None = None

    @property
    def prompts(self) -> dict[str, Prompt]:
        """All problems by their id, in order."""
        return {prompt.id: prompt for benchmark in self.benchmarks for prompt in benchmark.prompts}
