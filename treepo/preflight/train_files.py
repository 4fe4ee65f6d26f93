"""Reads and checks the training prompts: one file, or the files of a mixture.

An error about a file of a mixture also names its key, `data.train.1`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from treepo.config.data import ColumnsConfig, whole_weights
from treepo.config.run import RunConfig
from treepo.data.mixture import PromptMixture, TrainingPrompts
from treepo.data.prompt_order import MixtureOrder
from treepo.data.prompts import DataReport, PromptSet, check_prompts, load_prompts
from treepo.data.tokenizer import Tokenizer
from treepo.errors import ConfigError, DataError


def check_train_files(config: RunConfig) -> None:
    """Check every row of the training files, except what needs a tokenizer. Raises DataError."""
    data, as_json = config.data, config.reward.url is not None
    if not isinstance(data.train, list):
        check_prompts(data.train, data.columns, data, extra_as_json=as_json)
        return
    for number, file in enumerate(data.train):
        with _named(number):
            columns, key = _columns(config, number)
            check_prompts(file.path, columns, data, key=key, extra_as_json=as_json)


def load_train_files(config: RunConfig, tokenizer: Tokenizer) -> tuple[TrainingPrompts, list[DataReport]]:
    """Open the training prompts. Raises DataError, and ConfigError if a file has too few for one step."""
    data, as_json = config.data, config.reward.url is not None
    if not isinstance(data.train, list):
        train = load_prompts(data.train, data.columns, tokenizer, data, extra_as_json=as_json)
        if len(train) < data.prompts_per_step:
            raise ConfigError(
                f"data.prompts_per_step = {data.prompts_per_step}, but {data.train} has {len(train)} usable "
                "rows"
            )
        return train, [train.report]
    files: dict[str, PromptSet] = {}
    for number, file in enumerate(data.train):
        with _named(number):
            columns, key = _columns(config, number)
            files[file.label] = load_prompts(
                file.path, columns, tokenizer, data, key=key, extra_as_json=as_json, name=file.label
            )
    mixture = PromptMixture(files, whole_weights(data.train))
    _check_sizes(config, files, mixture.order(config.seed))
    return mixture, [prompts.report for prompts in files.values()]


def _check_sizes(config: RunConfig, files: Mapping[str, PromptSet], order: MixtureOrder) -> None:
    """A prompt begins one tree under each version, so each file needs as many as one step takes of it."""
    prompts = config.data.prompts_per_step
    for number, file in enumerate(files.values()):
        if len(file) < (most := order.most_turns(number, prompts)):
            raise ConfigError(
                f"data.train.{number}: {file.report.path} has {len(file)} usable rows, but by its weight a "
                f"step of data.prompts_per_step = {prompts} takes up to {most} of its prompts; lower the "
                "weight, or join files"
            )


def _columns(config: RunConfig, number: int) -> tuple[ColumnsConfig, str]:
    """The column names of a file of the mixture, and their key."""
    own = config.data.mixture[number].columns
    return (config.data.columns, "data.columns") if own is None else (own, f"data.train.{number}.columns")


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Errors of the body name the file's key."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.train.{number}: {error}") from error
