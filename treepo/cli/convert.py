"""`treepo convert`: converts training checkpoints to Hugging Face folders and back."""

import time
from pathlib import Path
from typing import Annotated

import typer

from treepo.cli.console import output, progress_console
from treepo.data.model_config import CONFIG
from treepo.errors import ModelError


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A training checkpoint, or a Hugging Face folder.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write, of the other kind.")],
) -> None:
    """Convert a training checkpoint to a Hugging Face folder, or the other way round."""
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
            converted = run(source, target, progress)
    except ModelError as error:
        raise ModelError(f"{error}{instead_of(source)}") from error
    show_converted(output, converted, target, time.perf_counter() - started)
