"""Finds the runs, evaluations and rollouts that the paths of `treepo view` name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo.data.output_folder import CONFIG, TREES
from treepo.errors import DataError
from treepo.evaluation.results import RESULTS
from treepo.training.run_folder import METRICS

_SHOWN = (METRICS, TREES, RESULTS, CONFIG)


@dataclass(frozen=True, slots=True)
class Source:
    """One run, evaluation or rollout.

    name: distinct among the sources of a page. folder: that of its files. trees: its file of trees, which may
    be missing.
    """

    name: str
    folder: Path
    trees: Path


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """The sources that the paths name, each once: a folder of one, a folder of such folders, or a file of
    trees.

    Raises DataError if a path names none.
    """
    found = dict.fromkeys(trees.absolute() for path in paths for trees in _trees_files(path))
    return [Source(name, trees.parent, trees) for name, trees in zip(_names(list(found)), found, strict=True)]


def _trees_files(path: Path) -> list[Path]:
    """Where the trees of each source below the path are, or would be."""
    try:
        if path.is_file():
            if path.name in _SHOWN and path.name != TREES:  # named instead of its folder
                return [path.parent / TREES]
            return [path]
        folders = [path, *sorted(below for below in path.iterdir() if below.is_dir())]
        shown = [folder for folder in folders if any((folder / name).exists() for name in _SHOWN)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not shown:
        raise DataError(f"{path}: neither it nor a folder in it has {', '.join(_SHOWN[:-1])} or {CONFIG}")
    return [folder / TREES for folder in (shown[:1] if shown[0] == path else shown)]


def _names(files: Sequence[Path]) -> list[str]:
    """The ends of the paths that are long enough to tell them apart. A usual file has its folder's name."""
    whole = [file.parent if file.name == TREES else file for file in files]
    for length in range(1, max((len(path.parts) for path in whole), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]
