"""`treepo train`: a training run on this machine, or on the Ray cluster that RAY_ADDRESS names."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import OVERRIDES, check_surroundings, errors, output, show_data
from treepo.config.load import load_config
from treepo.errors import EXIT_INTERRUPTED


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, for example examples/quickstart.yaml.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES)] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest checkpoint in the run folder, or begin if there is none.",
        ),
    ] = False,
) -> None:
    """Train a model: sample trees, grade them, learn from them, send the new weights to the engines."""
    run_config = load_config(config, overrides or [])
    check_surroundings(run_config.out)
    from treepo.display.train import TrainDisplay, show_resume, show_summary
    from treepo.preflight.inputs import read_train_inputs

    inputs = read_train_inputs(run_config)
    show_data(inputs.reports)
    from treepo.training.checkpoints import saved_step
    from treepo.training.resume import find_resume

    origin = find_resume(run_config, inputs) if resume else None
    if resume:
        show_resume(output, origin, run_config.out)
    from treepo.cluster.session import training_session
    from treepo.rollout.stopping import StopRule
    from treepo.training.train import train as run

    stop_rule = StopRule(run_config.sampling, inputs.tokenizer.decode)
    try:
        overlaps = run_config.max_untrained > run_config.data.prompts_per_step
        title = f"{config} -> {run_config.out}"
        with TrainDisplay(output, title, run_config.steps, overlaps=overlaps) as display:
            start = partial(training_session, run_config, stop_rule)
            summary = asyncio.run(run(run_config, inputs, display, start, origin))
    except KeyboardInterrupt:
        errors.print(f"Interrupted. All processes have ended; the files so far are in {run_config.out}/")
        if (last := saved_step(run_config.out)) is not None:
            errors.print(f"--resume continues after step {last}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_summary(output, summary, run_config.out)
