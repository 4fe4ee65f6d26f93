"""The `treepo` command. It parses, checks, calls and shows; nothing heavy is imported before it is needed."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from treepo.config.load import load_as, load_config
from treepo.errors import EXIT_INTERRUPTED, ConfigError, TreepoError

if TYPE_CHECKING:
    from treepo.data import DataReport

app = typer.Typer(
    help="Reinforcement learning for reasoning models whose rollouts are trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_output = Console()
_errors = Console(stderr=True)


@app.callback()
def _commands() -> None:
    """Make `treepo` a group even while it has few commands."""


@app.command()
def toy(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/toy"),
    seed: Annotated[int, typer.Option(help="Of the data and of the model.")] = 0,
    force: Annotated[bool, typer.Option(help="Make it again even if it is there.")] = False,
) -> None:
    """Make a small model and arithmetic problems that it gets right about two times in five."""
    from treepo.display.train import show_toy, toy_progress
    from treepo.toy.make import make_toy

    with toy_progress(_output) as progress:
        report = make_toy(out, seed=seed, force=force, progress=progress)
    show_toy(_output, report)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, for example examples/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint in the run folder; where there is none, begin.",
        ),
    ] = False,
) -> None:
    """Train a model: sample trees, grade them, learn from them, hand the new weights to the sampler."""
    run_config = load_config(config, overrides or [])
    from treepo.display.train import TrainDisplay, show_resume, show_summary
    from treepo.orchestration.inputs import read_inputs

    inputs = read_inputs(run_config)
    _show_data(inputs.reports)
    from treepo.orchestration.checkpoints import newest
    from treepo.orchestration.resume import find_resume

    origin = find_resume(run_config, inputs) if resume else None
    if resume:
        show_resume(_output, origin, run_config.out)
    from treepo.orchestration.train import train as run

    try:
        with TrainDisplay(_output, f"{config} -> {run_config.out}", run_config.steps) as display:
            summary = asyncio.run(run(run_config, inputs, display, origin))
    except KeyboardInterrupt:
        _errors.print(f"Interrupted. What was started has ended; what was written is in {run_config.out}/")
        if (last := newest(run_config.out)) is not None:
            _errors.print(f"--resume goes on from step {last[1].step}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_summary(_output, summary, run_config.out)


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="A YAML file; on a filesystem that all nodes share.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="As of `treepo train`.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes in all.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this is, from 0.")] = None,
    head: Annotated[str | None, typer.Option(help="HOST[:PORT] of node 0, as the others reach it.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where nodes meet at the head.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds in which all devices must come.")] = 600,
    dashboard_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of Ray's dashboard, on the head's loopback.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=0, help="CPUs that this node offers; all of them.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that this node offers; all of them.")] = None,
) -> None:
    """Train on many nodes: the same command on each of them, or once where a Ray cluster is.

    Slurm's and torchrun's variables say which node this is, or --nodes, --node-rank and --head; RAY_ADDRESS
    names a cluster that is there. Without any of them it is this machine alone.
    """
    run_config = load_config(config, overrides or [])
    from treepo.orchestration.allocation import Flags, find_allocation

    where = find_allocation(os.environ, Flags(nodes, node_rank, head, port))
    from treepo.orchestration.launch import Launch
    from treepo.orchestration.launch import launch as run
    from treepo.orchestration.ray_node import Slots

    def check() -> None:
        from treepo.orchestration.inputs import read_inputs
        from treepo.orchestration.resume import find_resume

        inputs = read_inputs(run_config)
        if resume:
            find_resume(run_config, inputs)

    order = Launch(
        run_config,
        [str(config), *(overrides or []), *(["--resume"] if resume else [])],
        check,
        wait,
        Slots(cpus, gpus),
        dashboard_port,
        say=lambda text: _output.print(
            f"[bold]launch:[/bold] {escape(text)}", highlight=False, soft_wrap=True
        ),
        write=_write,
    )
    try:
        exit_code = asyncio.run(run(where, order))
    except KeyboardInterrupt:
        _errors.print("Interrupted. What was started has ended.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(exit_code)


def _write(text: str) -> None:
    """What another process has printed, as it is."""
    _output.file.write(text)
    _output.file.flush()


@app.command()
def rollout(
    config: Annotated[Path, typer.Argument(help="A YAML file, for example examples/rollout.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Sample trees for a file of prompts, without training and without grading: one tree a line."""
    from treepo.config.rollout import RolloutConfig

    rollout_config = load_as(RolloutConfig, config, overrides or [])
    from treepo.orchestration.rollout_inputs import read_inputs

    inputs = read_inputs(rollout_config)
    _show_data([inputs.prompts.report])
    from treepo.display.rollout import RolloutDisplay, show_rollout
    from treepo.orchestration.rollout import rollout as run

    try:
        with RolloutDisplay(_output, f"{config} -> {rollout_config.out}") as display:
            summary = asyncio.run(run(rollout_config, inputs, display))
    except KeyboardInterrupt:
        _errors.print(
            f"Interrupted. What was started has ended; the trees so far are in {rollout_config.out}/"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_rollout(_output, summary, rollout_config.out)


@app.command()
def plan(
    config: Annotated[
        Path, typer.Argument(help="A YAML file for training, for example examples/models/qwen3-8b.yaml.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """What a training run will need and how long its steps take, worked out without a GPU or the weights.

    Exit code 2 where it does not fit; the nearest layouts that do are named.
    """
    run_config = load_config(config, overrides or [])
    from treepo.display.plan import plan_progress, show_plan
    from treepo.planning import plan as planning

    with plan_progress(_errors) as doing:
        made = planning.make_plan(run_config, doing)
    if as_json:
        _output.print_json(data=planning.as_json(made))
    else:
        show_plan(_output, str(config), made)
    if made.fit.problem is not None:
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A training checkpoint, or a Hugging Face folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write: of the other kind.")],
) -> None:
    """Turn a training checkpoint into a Hugging Face folder, or the other way round."""
    from megatron_bridge.convert import convert as run
    from treepo.display.conversion import convert_progress, show_converted

    started = time.perf_counter()
    with convert_progress(_output) as progress:
        converted = run(source, target, progress)
    show_converted(_output, converted, target, time.perf_counter() - started)


@app.command(name="eval")
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
    from treepo.orchestration.evaluate_inputs import read_inputs

    inputs = read_inputs(eval_config)
    from treepo.display.evaluation import EvaluationDisplay, show_evaluation
    from treepo.orchestration.evaluate import evaluate as run

    source = path or eval_config.model.path or eval_config.model.url
    try:
        with EvaluationDisplay(_output, f"{source} -> {eval_config.out}", inputs) as display:
            results = asyncio.run(run(eval_config, inputs, display, anew=force))
    except KeyboardInterrupt:
        _errors.print(
            f"Interrupted. What was started has ended; the same command goes on from {eval_config.out}/"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_evaluation(_output, results, eval_config.out)


def _compare(folders: list[str], out: Path | None) -> None:
    """Every further folder against the first."""
    if len(folders) < 2:
        raise ConfigError(f"--compare: at least two folders are needed, {len(folders)} given")
    from treepo.comparison import compare, read_results
    from treepo.display.comparison import show_comparison
    from treepo.report.plot import accuracy_plot, curve

    results = [read_results(Path(folder)) for folder in folders]
    for name, other in zip(folders[1:], results[1:], strict=True):
        show_comparison(_output, folders[0], name, compare(results[0], other))
    if out is not None:
        try:
            out.write_text(accuracy_plot([curve(*pair) for pair in zip(results, folders, strict=True)]))
        except OSError as error:
            raise ConfigError(f"--out: {out}: {error.strerror}") from None
        _output.print(f"accuracy against compute of all of them: {out}", highlight=False)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of lines.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without collectives, engine and trainer: seconds.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="One check by its name; again for each.")] = None,
) -> None:
    """Check this machine: versions, devices, limits, network, and a real engine and trainer on a toy.

    Exit code 1 where a check failed. On every node of a job: srun --label treepo doctor
    """
    import socket

    from treepo.display.doctor import show_report, watch
    from treepo.doctor.checks import chosen
    from treepo.doctor.examine import examine_all
    from treepo.doctor.outcome import Report
    from treepo.doctor.software import installed_version

    started = time.perf_counter()
    console = _errors if json else _output
    try:
        results = watch(console, examine_all(chosen(only), quick), lines=not json)
    except KeyboardInterrupt:
        _errors.print("Interrupted. What was started has ended.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    report = Report(socket.gethostname(), installed_version("treepo"), results)
    if json:
        _output.print_json(data=report.as_json())
    else:
        show_report(_output, report, time.perf_counter() - started)
    raise typer.Exit(report.exit_code)


def _show_data(reports: "Iterable[DataReport]") -> None:
    """What each file holds, a line each."""
    for report in reports:
        _output.print(report.summary(), highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: an error that a user can understand is one line."""
    # The progress bars of libraries would draw over ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _show_warnings()
    # A reward function's own traceback is for its author, who sits at the terminal.
    if logging.lastResort is not None:
        logging.getLogger("treepo.rewards").addHandler(logging.lastResort)
    exit_code = 0
    try:
        app()
    except* TreepoError as group:
        # What many tasks wait for fails in all of them: that is said once.
        for text, error in {str(error): error for error in _single(group)}.items():
            _errors.print(f"[bold red]error:[/bold red] {escape(text)}", highlight=False, soft_wrap=True)
            exit_code = max(exit_code, error.exit_code)
    sys.exit(exit_code)


def _show_warnings() -> None:
    """On the terminal too, whatever else happens to the log; what ends a run is shown as an error instead."""
    warnings: logging.Handler
    if _errors.is_terminal:
        warnings = RichHandler(logging.WARNING, _errors, show_time=False, show_path=False)
    else:  # a line each, however long: a file has no width
        warnings = logging.StreamHandler()
        warnings.setLevel(logging.WARNING)
        warnings.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    warnings.addFilter(lambda record: record.exc_info is None)
    for package in ("treepo", "sglang_rollout"):
        logging.getLogger(package).addHandler(warnings)


def _single(group: BaseExceptionGroup[TreepoError]) -> Iterator[TreepoError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _single(error)
        else:
            yield error
