"""`treepo rollout`: samples trees for a file of prompts, without training."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import check_surroundings, output, progress_console, show_data
from treepo.cli.failures import stoppable
from treepo.cli.overrides import Overrides
from treepo.config.load import load_as


def rollout(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, for example examples/rollout.yaml.")
    ],
    overrides: Overrides = None,
) -> None:
    """Sample trees for a file of prompts, without grading or training; writes one tree a line."""
    from treepo.config.rollout import RolloutConfig

    rollout_config = load_as(RolloutConfig, config, overrides or [])
    with stoppable(lambda: f"the trees so far are in {rollout_config.out}/") as stopper:
        check_surroundings(rollout_config.out)
        from treepo.preflight.inputs import read_rollout_inputs
        from treepo.preflight.recommended_sampling import rollout_as_recommended

        rollout_config = rollout_as_recommended(rollout_config)
        inputs = read_rollout_inputs(rollout_config)
        show_data([inputs.prompts.report.summary()])
        from treepo.cluster.session import engine_session
        from treepo.display.rollout import RolloutDisplay, show_rollout
        from treepo.rollout.sample_file import rollout as run
        from treepo.rollout.stopping import StopRule

        stop_rule = StopRule(rollout_config.sampling, inputs.tokenizer.decode)
        with RolloutDisplay(progress_console, f"{config} -> {rollout_config.out}") as display:
            start = partial(engine_session, rollout_config, stop_rule)
            summary = stopper.run(run(rollout_config, inputs, display, start))
        show_rollout(output, summary, rollout_config.out)
