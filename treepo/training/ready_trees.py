"""The file in a checkpoint with the finished trees that no step has taken or counted: one tree a line.

It has their routes: without them a resumed run would train other experts.
"""

from collections.abc import Mapping
from pathlib import Path

import orjson

from treepo.errors import ModelError, one_line
from treepo.training.tree_supply import FinishedTree
from treepo.tree import from_json, to_json


def ready_trees_lines(trees: Mapping[int, FinishedTree]) -> bytes:
    """The content of the file. trees: by the positions of their prompts in the training order."""
    return b"".join(
        to_json(finished.tree, routes=True, position=position, answer=finished.answer)
        for position, finished in sorted(trees.items())
    )


def read_ready_trees(path: Path) -> dict[int, FinishedTree]:
    """Read the trees by position. Raises ModelError that names the first line which no checkpoint has."""
    trees: dict[int, FinishedTree] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ModelError(f"{path}: not readable: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            tree, record = from_json(line), orjson.loads(line)
            position, answer = int(record["position"]), str(record["answer"])
            if position in trees:
                raise ValueError(f"position {position} was in a line before")
            trees[position] = FinishedTree(tree, answer)
        except (ValueError, OverflowError, KeyError, TypeError) as error:
            raise ModelError(f"{path}:{number}: not a tree of a checkpoint: {one_line(error)}") from None
    return trees
