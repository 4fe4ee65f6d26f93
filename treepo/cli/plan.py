"""`treepo plan`: works out what a training run needs, without a GPU."""

from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import errors, output, progress_console
from treepo.cli.overrides import Overrides
from treepo.config.load import load_config
from treepo.errors import ConfigError


def plan(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="A YAML file for training, for example examples/models/qwen3-8b.yaml."
        ),
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Predict a training run's memory and step time, without a GPU or the model's weights.

    If the run does not fit, the nearest layouts that do are listed, and the exit code is 2.
    """
    run_config = load_config(config, overrides or [])
    from treepo.display.plan import plan_progress, show_plan
    from treepo.planning import plan as planning

    with plan_progress(progress_console if progress_console.quiet else errors) as report:
        made = planning.make_plan(run_config, report)
    if as_json:
        output.print_json(data=planning.as_json(made))
    else:
        show_plan(output, str(config), made)
    if made.fit.problem is not None:
        raise typer.Exit(ConfigError.exit_code)
