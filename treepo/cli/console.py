"""What the commands share: the consoles of standard output and standard error."""

import os
from collections.abc import Iterable
from pathlib import Path

from treepo.display.safe_console import SafeConsole

output = SafeConsole()
"""Results."""

progress_console = SafeConsole()
"""What a command is doing, also on standard output; --quiet silences it."""

errors = SafeConsole(stderr=True)


def show_data(lines: Iterable[str]) -> None:
    """Show what the data files contain."""
    for line in lines:
        progress_console.print(line, highlight=False, soft_wrap=True)


def check_surroundings(out: Path, *, uses_ray: bool = True) -> None:
    """Raise TreepoError if another command writes into the folder, if the files in it are not a command's, or
    if the Ray cluster that RAY_ADDRESS names does not answer: before the inputs are read, which may take
    minutes.
    """
    from treepo.data.folder_lock import check_free
    from treepo.data.output_folder import check_own

    check_free(out)
    check_own(out)
    if uses_ray and os.environ.get("RAY_ADDRESS"):  # else Ray need not be imported yet
        from treepo.cluster.ray_address import check_cluster, named_cluster

        named = named_cluster()
        if named is not None:
            check_cluster(named)
