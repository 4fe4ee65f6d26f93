"""`treepo convert`: converts checkpoints, adapters and GGUF files to Hugging Face folders, and those back."""

import time
from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import output, progress_console
from treepo.data.model_config import CONFIG
from treepo.errors import ModelError


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A training checkpoint, a Hugging Face folder, an adapter in PEFT's format or a GGUF file.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write, of the other kind.")],
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write a checkpoint's adapters alone, in PEFT's format, not merged."),
    ] = False,
) -> None:
    """Convert a training checkpoint, an adapter or a GGUF file to a Hugging Face folder, or a folder to a
    checkpoint.
    """
    from megatron_bridge.convert import convert as run
    from treepo.display.conversion import convert_progress, show_converted
    from treepo.preflight.model_folder import check_present_parts
    from treepo.training.checkpoint_manifest import is_checkpoint
    from treepo.training.checkpoints import instead_of

    if (source / CONFIG).is_file() and not is_checkpoint(source):
        check_present_parts(source)
    started = time.perf_counter()
    try:
        with convert_progress(progress_console) as progress:
            converted = run(source, target, progress, adapter=adapter)
    except ModelError as error:
        raise ModelError(f"{error}{instead_of(source)}") from error
    show_converted(output, converted, target, time.perf_counter() - started)
