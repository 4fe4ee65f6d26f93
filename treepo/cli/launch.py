"""`treepo launch`: a training run on many nodes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from treepo.cli.console import output
from treepo.cli.failures import ALL_ENDED, stoppable
from treepo.cli.overrides import Overrides
from treepo.cli.train import left
from treepo.cli.verbosity import verbosity_flags
from treepo.config.load import load_config
from treepo.stack_dumps import ignore_requests

_OF_THE_NODE = "the head tells what the run leaves"
_JOB_LEFT = "The job may still be ending in the cluster"


def launch(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, on a file system that all nodes share.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint, as in `treepo train`.")
    ] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Rank of this node, from 0.")] = None,
    head: Annotated[
        str | None, typer.Option(help="HOST[:PORT] of node 0, as the other nodes reach it.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Rendezvous port on the head; by default the scheduler's, else 29400."
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait for all devices; and, on the other nodes, for the head."),
    ] = 600,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Restarts after crashes, each from the newest checkpoint. A new checkpoint gives all back.",
        ),
    ] = 3,
    dashboard_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of Ray's dashboard, on the head's loopback; by default a free one."
        ),
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=0, help="CPUs of this node to use; by default all.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of this node to use; by default all.")] = None,
) -> None:
    """Train on several nodes: run the same command on every node, or once on a running Ray cluster.

    The nodes are found in Slurm's or torchrun's variables, or given by --nodes, --node-rank and --head.
    RAY_ADDRESS names a running cluster. Without any of these the run uses this machine alone.

    SIGTERM and Ctrl-C end the training, and all processes of all nodes when the head gets them (exit code 143
    or 130); a second signal kills this node's at once.
    """
    ignore_requests()
    run_config = load_config(config, overrides or [])
    from treepo.cluster.allocation import Cluster, Flags, find_allocation

    target = find_allocation(os.environ, Flags(nodes, node_rank, head, port))

    def check() -> None:
        from treepo.data.folder_lock import check_free
        from treepo.preflight.inputs import read_train_inputs
        from treepo.training.resume import find_resume

        check_free(run_config.out)
        inputs = read_train_inputs(run_config)
        if resume:
            find_resume(run_config, inputs, contents=False)  # the training reads them

    def leaves() -> str:
        return left(run_config.out) if isinstance(target, Cluster) or target.rank == 0 else _OF_THE_NODE

    cut_short = _JOB_LEFT if isinstance(target, Cluster) else ALL_ENDED
    with stoppable(leaves, cut_short=cut_short) as stopper:
        from treepo.cluster.launch import launch as run
        from treepo.cluster.launch_parts import Launch
        from treepo.cluster.ray_node import NodeResources

        spec = Launch(
            run_config,
            [str(config), *(overrides or []), *verbosity_flags()],
            resume,
            check,
            wait,
            max_restarts,
            NodeResources(cpus, gpus),
            dashboard_port,
            interrupted=lambda: stopper.exit_code,
            say=lambda text: output.print(Text.assemble(("launch:", "bold"), f" {text}"), soft_wrap=True),
            write=TrainingOutput(lambda: stopper.received is not None).write,
        )
        exit_code = stopper.run(run(target, spec))
    raise typer.Exit(exit_code)


class TrainingOutput:
    """Writes the training's output unchanged; of a launch that ends, only the training's errors, because the
    launch itself says how it has ended.
    """

    def __init__(self, ends: Callable[[], bool]) -> None:
        self._ends, self._line = ends, ""

    def write(self, text: str) -> None:
        """Write the next characters of the output, which may end within a line."""
        if self._ends():
            *lines, self._line = (self._line + text).split("\n")
            text = "".join(f"{line}\n" for line in lines if line.startswith("error: "))
        output.file.write(text)
        output.file.flush()
