"""`treepo init`: writes a first configuration."""

from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import errors, output, progress_console
from treepo.errors import ConfigError


def init(
    model: Annotated[Path, typer.Option(help="A Hugging Face model folder.")],
    data: Annotated[Path, typer.Option(help="Problems: a .jsonl or .parquet file, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="The YAML file to write.")] = Path("train.yaml"),
    run: Annotated[
        Path | None, typer.Option(help="The run's folder; by default runs/ and the file's name.")
    ] = None,
) -> None:
    """Write a commented YAML file for `treepo train`, with a layout that fits this machine.

    Columns and lengths come from the data file, the layout from the planner.
    """
    if out.exists():
        raise ConfigError(f"{out} exists, and init overwrites nothing: --out names another file")
    from treepo.display.plan import plan_progress
    from treepo.planning.fit import fit
    from treepo.planning.found_machine import found_machine
    from treepo.planning.starter import first_config, read_problems, render
    from treepo.preflight.model_folder import check_files

    check_files(model)
    with plan_progress(progress_console if progress_console.quiet else errors) as report:
        report("look at the machine and the data")
        machine, problems = found_machine(), read_problems(data, model)
        report("look for a layout that fits")
        folder = run or Path("runs") / out.stem
        config = first_config(model, problems, folder, machine, lambda config: fit(config, model).problem)
    with out.open("x", encoding="utf-8") as file:
        file.write(render(config, problems, machine, out))
    parallel, engine = config.trainer.parallel, config.engine
    output.print(
        f"{out}: {problems.rows} problems, {machine.name}, {parallel.data} x {parallel.tensor} trainer "
        f"ranks, {engine.count} x {engine.tensor} engine ranks",
        highlight=False,
        soft_wrap=True,
    )
    output.print(f"treepo train {out}", highlight=False, soft_wrap=True)
