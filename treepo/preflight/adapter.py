"""Serves an adapter in PEFT's format as a whole model, merged into its base in a temporary folder."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from treepo.config.evaluate import EvalConfig
from treepo.data.temporary_folder import TemporaryFolder
from treepo.preflight.inputs import check_served


@contextmanager
def with_adapter_merged(config: EvalConfig) -> Iterator[EvalConfig]:
    """Yield the configuration; if its model is an adapter, that of the merged model, which exists until the
    body ends. Raises ModelError for an adapter that cannot be merged, and ConfigError if an engine could not
    serve its base.
    """
    from megatron_bridge.peft_folder import is_adapter, read_adapter

    if config.model.path is None or not is_adapter(config.model.path):
        yield config
        return
    from megatron_bridge.convert import convert

    base = read_adapter(config.model.path).base
    check_served(base, config.data.max_prompt_tokens, config.sampling.longest_response, config.engine)
    with closing(TemporaryFolder()) as folder:
        convert(config.model.path, folder.path / "merged")
        model = config.model.model_copy(update={"path": folder.path / "merged"})
        yield config.model_copy(update={"model": model})
