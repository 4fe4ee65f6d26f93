"""`treepo launch`: a training run on many nodes."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from treepo.cli.console import OVERRIDES, errors, output
from treepo.config.load import load_config
from treepo.errors import EXIT_INTERRUPTED
from treepo.stack_dumps import ignore_requests


def launch(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, on a file system that all nodes share.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES)] = None,
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
    """
    ignore_requests()
    run_config = load_config(config, overrides or [])
    from treepo.cluster.allocation import Flags, find_allocation

    target = find_allocation(os.environ, Flags(nodes, node_rank, head, port))
    from treepo.cluster.launch import launch as run
    from treepo.cluster.launch_parts import Launch
    from treepo.cluster.ray_node import NodeResources

    def check() -> None:
        from treepo.data.folder_lock import check_free
        from treepo.preflight.inputs import read_train_inputs
        from treepo.training.resume import find_resume

        check_free(run_config.out)
        inputs = read_train_inputs(run_config)
        if resume:
            find_resume(run_config, inputs, contents=False)  # the training reads them

    spec = Launch(
        run_config,
        [str(config), *(overrides or [])],
        resume,
        check,
        wait,
        max_restarts,
        NodeResources(cpus, gpus),
        dashboard_port,
        say=lambda text: output.print(Text.assemble(("launch:", "bold"), f" {text}"), soft_wrap=True),
        write=_write,
    )
    try:
        exit_code = asyncio.run(run(target, spec))
    except KeyboardInterrupt:
        errors.print("Interrupted. All processes have ended.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(exit_code)


def _write(text: str) -> None:
    """Write another process's output unchanged."""
    output.file.write(text)
    output.file.flush()
