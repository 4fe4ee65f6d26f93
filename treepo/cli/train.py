"""`treepo train`: a training run on this machine, or on the Ray cluster that RAY_ADDRESS names."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import check_surroundings, output, progress_console, show_data
from treepo.cli.failures import stoppable
from treepo.cli.overrides import Overrides
from treepo.config.load import load_config


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, for example examples/quickstart.yaml.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest checkpoint in the run folder, or begin if there is none.",
        ),
    ] = False,
) -> None:
    """Train a model: sample trees, grade them, learn from them, send the new weights to the engines.

    SIGTERM and Ctrl-C end all processes (exit code 143 or 130); a second signal kills them at once.
    """
    run_config = load_config(config, overrides or [])
    with stoppable(lambda: left(run_config.out)) as stopper:
        check_surroundings(run_config.out)
        from treepo.display.status import show_conclusion
        from treepo.display.train import TrainDisplay, show_resume, show_summary
        from treepo.preflight.inputs import read_train_inputs

        inputs = read_train_inputs(run_config)
        show_data(inputs.summaries(run_config))
        from treepo.training.resume import find_resume

        origin = find_resume(run_config, inputs) if resume else None
        if resume:
            show_resume(progress_console, origin, run_config.out)
        from treepo.cluster.session import training_session
        from treepo.rollout.stopping import StopRule
        from treepo.training.conclusion import conclusion_of
        from treepo.training.train import train as run

        stop_rule = StopRule(run_config.sampling, inputs.tokenizer.decode)
        overlaps = run_config.max_untrained > run_config.data.prompts_per_step
        title = f"{config} -> {run_config.out}"
        with TrainDisplay(progress_console, title, run_config.steps, overlaps=overlaps) as display:
            start = partial(training_session, run_config, stop_rule)
            summary = stopper.run(run(run_config, inputs, display, start, origin))
        show_summary(output, summary, run_config.out)
        show_conclusion(output, conclusion_of(run_config.out))


def left(out: Path) -> str:
    """What an interrupted run leaves, and how it goes on."""
    from treepo.training.checkpoints import saved_step

    last = saved_step(out)
    goes_on = "" if last is None else f"; --resume continues after step {last}"
    return f"the files so far are in {out}/{goes_on}"
