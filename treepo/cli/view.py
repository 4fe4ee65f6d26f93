"""`treepo view`: runs, evaluations and rollouts in the browser."""

import asyncio
import os
import sys
import webbrowser
from pathlib import Path
from signal import SIGINT, SIGTERM
from threading import Thread
from typing import Annotated

import typer

from treepo.cli.console import output


def view(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folders of runs, evaluations or rollouts, or trees.jsonl."),
    ],
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write one page that opens offline, and serve nothing."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port on loopback; 0 for one that is free.")
    ] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the browser.")] = False,
) -> None:
    """Show curves, configuration, log and trees of runs in the browser, also while they run."""
    from treepo.data.output_folder import write_file
    from treepo.view.bundle import exported_page, live_page
    from treepo.view.parts import open_parts
    from treepo.view.sources import find_sources

    sources = find_sources(paths)
    parts = open_parts(sources)
    if export is not None:
        write_file(export, exported_page(sources, parts))
        output.print(f"{export}: {export.stat().st_size / 1e6:.1f} MB", highlight=False, markup=False)
        return

    async def serve() -> None:
        from treepo.view.server import serving

        async with serving(live_page(sources, parts), parts, port) as address:
            output.print(f"{address}  (Ctrl-C ends it)", highlight=False, markup=False, soft_wrap=True)
            if not no_open and _has_display():
                Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            await _signal()

    asyncio.run(serve())


async def _signal() -> None:
    """Wait for Ctrl-C or SIGTERM, with which a server that works as it should is ended."""
    received = asyncio.Event()
    for number in (SIGINT, SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, received.set)
    await received.wait()


def _has_display() -> bool:
    """Whether a browser would open in a window: without one, it would take the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
