"""`treepo eval`: score a model on benchmarks, or compare evaluations."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from treepo.cli.console import errors, output
from treepo.config.load import load_as
from treepo.errors import EXIT_INTERRUPTED, ConfigError


def evaluate(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file, for example examples/eval-math.yaml."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model folder, or a running SGLang server's URL.")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="A benchmark's file; again for each.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to, and to go on from.")] = None,
    samples: Annotated[int | None, typer.Option(help="Responses to each problem.")] = None,
    tree: Annotated[
        bool | None,
        typer.Option("--tree/--sequential", help="Sample a tree, or independently (the default)."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens in a response.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Most tokens in a prompt.")] = None,
    max_problems: Annotated[int | None, typer.Option(help="Only the first so many of each file.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="In place of the rows' own.")] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template/--no-chat-template", help="On where the tokenizer has one."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder, for a server on another machine.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling and of bootstraps.")] = None,
    force: Annotated[bool, typer.Option(help="Start anew; what is in the folder is set aside.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare folders instead: treepo eval --compare A B...")
    ] = False,
) -> None:
    """Evaluate a model on benchmarks, or compare two evaluations. The same command goes on after a kill.

    Options stand for keys of the YAML file, which they override: treepo/config/evaluate.py has all of them.
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
    from treepo.preflight.evaluate import read_inputs

    inputs = read_inputs(eval_config)
    from treepo.display.evaluation import EvaluationDisplay, show_evaluation
    from treepo.evaluation.evaluate import evaluate as run

    source = path or eval_config.model.path or eval_config.model.url
    try:
        with EvaluationDisplay(output, f"{source} -> {eval_config.out}", inputs) as display:
            results = asyncio.run(run(eval_config, inputs, display, anew=force))
    except KeyboardInterrupt:
        errors.print(
            f"Interrupted. What was started has ended; the same command goes on from {eval_config.out}/"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_evaluation(output, results, eval_config.out)


def _compare(folders: list[str], out: Path | None) -> None:
    """Every further folder against the first."""
    if len(folders) < 2:
        raise ConfigError(f"--compare: at least two folders are needed, {len(folders)} given")
    from treepo.display.comparison import show_comparison
    from treepo.evaluation.comparison import compare
    from treepo.evaluation.report.plot import accuracy_plot, curve
    from treepo.evaluation.results import read_results

    results = [read_results(Path(folder)) for folder in folders]
    for name, other in zip(folders[1:], results[1:], strict=True):
        show_comparison(output, folders[0], name, compare(results[0], other))
    if out is not None:
        try:
            out.write_text(accuracy_plot([curve(*pair) for pair in zip(results, folders, strict=True)]))
        except OSError as error:
            raise ConfigError(f"--out: {out}: {error.strerror}") from None
        output.print(f"accuracy against compute of all of them: {out}", highlight=False)
