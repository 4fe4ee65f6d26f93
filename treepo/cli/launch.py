"""`treepo launch`: the same training run on many nodes."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from treepo.cli.console import errors, output
from treepo.config.load import load_config
from treepo.errors import EXIT_INTERRUPTED


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
    from treepo.cluster.allocation import Flags, find_allocation

    where = find_allocation(os.environ, Flags(nodes, node_rank, head, port))
    from treepo.cluster.launch import Launch
    from treepo.cluster.launch import launch as run
    from treepo.cluster.ray_node import NodeResources

    def check() -> None:
        from treepo.preflight.inputs import read_train_inputs
        from treepo.training.resume import find_resume

        inputs = read_train_inputs(run_config)
        if resume:
            find_resume(run_config, inputs)

    order = Launch(
        run_config,
        [str(config), *(overrides or []), *(["--resume"] if resume else [])],
        check,
        wait,
        NodeResources(cpus, gpus),
        dashboard_port,
        say=lambda text: output.print(
            f"[bold]launch:[/bold] {escape(text)}", highlight=False, soft_wrap=True
        ),
        write=_write,
    )
    try:
        exit_code = asyncio.run(run(where, order))
    except KeyboardInterrupt:
        errors.print("Interrupted. What was started has ended.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(exit_code)


def _write(text: str) -> None:
    """What another process has printed, as it is."""
    output.file.write(text)
    output.file.flush()
