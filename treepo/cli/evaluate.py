"""`treepo eval`: evaluates a model on benchmarks, or compares evaluations."""

from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treepo.cli.console import check_surroundings, output, progress_console
from treepo.cli.failures import stoppable
from treepo.cli.overrides import Overrides
from treepo.config.load import load_as
from treepo.errors import ConfigError

if TYPE_CHECKING:
    from treepo.config.evaluate import EvalConfig
    from treepo.data.inputs import EvaluationInputs
    from treepo.protocols import EnginePool


def evaluate(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file, for example examples/eval-math.yaml."),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model folder, PEFT's folder of an adapter, or a server's URL."),
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="A benchmark's file; may be repeated.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; an interrupted evaluation continues in it.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Responses to each problem.")] = None,
    tree: Annotated[
        bool | None,
        typer.Option("--tree/--sequential", help="Sample trees, or independent responses (the default)."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 takes the likeliest token.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens with this probability together."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many of the likeliest tokens.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample from tokens with this share of the likeliest's probability."),
    ] = None,
    from_model: Annotated[
        bool | None,
        typer.Option("--from-model", help="Take what is not given of these four as the model recommends."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens in a response.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Most tokens in a prompt.")] = None,
    max_problems: Annotated[int | None, typer.Option(help="Only the first N problems of each file.")] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="A system prompt in place of the rows' own.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template/--no-chat-template", help="On if the tokenizer has one."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder, for a server on another machine.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling and of the bootstraps.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start over; earlier files in the folder are set aside.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare folders instead: treepo eval --compare A B...")
    ] = False,
) -> None:
    """Evaluate a model on benchmarks, or compare evaluations. After a kill the same command continues.

    Options override keys of the YAML file. All keys: docs/configuration.md
    """
    arguments = [*filter(None, [config]), *(overrides or [])]
    if compare:
        _compare(arguments, out)
        return
    options = {
        "out": out,
        "model": model,
        "data": data or None,
        "samples": samples,
        "tree": tree,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "from_model": from_model,
        "max_tokens": max_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "max_problems": max_problems,
        "system_prompt": system_prompt,
        "chat_template": chat_template,
        "tokenizer": tokenizer,
        "seed": seed,
    }
    _evaluate(arguments, options, force=force)


def _evaluate(arguments: list[str], options: dict[str, Any], *, force: bool) -> None:
    from treepo.config.evaluate import EvalConfig, overrides_of

    path = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else None
    eval_config = load_as(EvalConfig, path, [*overrides_of(options), *arguments])
    with ExitStack() as stack:
        stopper = stack.enter_context(stoppable(lambda: f"the same command continues in {eval_config.out}/"))
        check_surroundings(eval_config.out, uses_ray=eval_config.model.url is None)
        from treepo.preflight.adapter import with_adapter_merged
        from treepo.preflight.inputs import read_evaluation_inputs
        from treepo.preflight.recommended_sampling import evaluation_as_recommended

        served = stack.enter_context(with_adapter_merged(eval_config))
        served = evaluation_as_recommended(served)
        eval_config = served.model_copy(update={"model": eval_config.model})
        inputs = read_evaluation_inputs(served)
        from treepo.display.evaluation import EvaluationDisplay, show_evaluation
        from treepo.evaluation.evaluate import evaluate as run

        source = path or eval_config.model.path or eval_config.model.url
        with EvaluationDisplay(progress_console, f"{source} -> {eval_config.out}", inputs) as display:
            start = partial(evaluation_engines, served, inputs)
            results = stopper.run(run(eval_config, inputs, display, start, anew=force))
        show_evaluation(output, results, eval_config.out)


def evaluation_engines(
    config: "EvalConfig", inputs: "EvaluationInputs"
) -> "AbstractAsyncContextManager[EnginePool]":
    """Use the running server that the configuration names, or start engines."""
    from treepo.rollout.stopping import StopRule

    if config.model.url is None:
        from treepo.cluster.session import evaluation_session

        return evaluation_session(config, StopRule(config.sampling, inputs.tokenizer.decode))
    from sglang_rollout.http_engine import ServerEngine, server_session

    stops = config.sampling.stops
    engine = ServerEngine(
        config.model.url,
        inputs.tokenizer.end_tokens,
        config.engine.request_seconds,
        boundaries=stops.boxed == "end" or stops.repetition.check != "off",
    )
    return server_session(engine, inputs.kv_tokens)


def _compare(folders: list[str], out: Path | None) -> None:
    """Compare every further folder with the first."""
    if len(folders) < 2:
        raise ConfigError(f"--compare: at least two folders are needed, {len(folders)} given")
    from treepo.data.output_folder import write_file
    from treepo.display.comparison import show_comparison
    from treepo.evaluation.comparison import compare, different_conditions
    from treepo.evaluation.report.plot import accuracy_plot, curve
    from treepo.evaluation.results import read_results

    results = [read_results(Path(folder)) for folder in folders]
    for name, other in zip(folders[1:], results[1:], strict=True):
        warning = different_conditions(results[0], other)
        show_comparison(output, folders[0], name, compare(results[0], other), warning)
    if out is not None:
        plot = accuracy_plot([curve(*pair) for pair in zip(results, folders, strict=True)])
        try:
            write_file(out, plot)
        except OSError as error:
            raise ConfigError(f"--out: {out}: {error.strerror}") from None
        output.print(f"accuracy against compute of all of them: {out}", highlight=False)
