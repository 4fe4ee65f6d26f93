"""The weights with which a training step trained the segments of its trees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from treepo.config.learning import LearningConfig
from treepo.config.yaml_text import read_mapping
from treepo.data.output_folder import CONFIG
from treepo.errors import ConfigError, DataError
from treepo.learning.advantage import estimate
from treepo.learning.dynamic_sampling import uninformative
from treepo.learning.packing import node_weights
from treepo.rewards.shaping import shaped
from treepo.view.trees_index import NO_STEP, TreesIndex

NotTrained = str
"""Why a tree has no weights."""


class StepWeights:
    """Weights of the trees of one file, a step's at a time: they depend on all trees of the step."""

    def __init__(self, index: TreesIndex, learning: LearningConfig | NotTrained) -> None:
        self._index, self._learning = index, learning
        self._known: tuple[tuple[int, ...], dict[int, np.ndarray]] = (), {}  # of the last step asked for

    def of(self, number: int) -> np.ndarray | NotTrained:
        """The weights of tree `number`: float64 [4, S] as in `node_weights`, or why there are none."""
        rows = self._index.rows
        step = int(rows["step"][number])
        if isinstance(self._learning, str):
            return self._learning
        if step == NO_STEP:
            return "the tree has no step"
        hashes = tuple(rows["hash"][rows["step"] == step].tolist())
        if self._known[0] != hashes:
            try:
                self._known = hashes, self._weights(np.flatnonzero(rows["step"] == step).tolist())
            except DataError as error:  # the advantages depend on all trees of the step
                return str(error)
        weights = self._known[1].get(number)
        return (
            "dynamic sampling dropped the tree: its answers' rewards are equal"
            if weights is None
            else weights
        )

    def _weights(self, numbers: list[int]) -> dict[int, np.ndarray]:
        """By tree, those of the step's trees that were trained."""
        assert isinstance(self._learning, LearningConfig)
        sampled = {number: self._index.tree(number)[1] for number in numbers}
        trained = {
            number: shaped(tree)
            for number, tree in sampled.items()
            if not (self._learning.dynamic_sampling and uninformative(tree))
        }
        advantages = estimate(list(trained.values()), self._learning)
        weights_N, first_P = node_weights(advantages), advantages.forest.first_P.tolist()
        return {
            number: weights_N[:, first + 1 : after]  # without the prompt
            for number, first, after in zip(trained, first_P[:-1], first_P[1:], strict=True)
        }


def read_config(folder: Path) -> tuple[LearningConfig | NotTrained, list[Path]]:
    """How the run in the folder learned, and where its tokenizer may be.

    Only two sections are read: the file may be of another version.
    """
    try:
        values, _ = read_mapping(folder / CONFIG)
    except ConfigError as error:
        return str(error), []
    model = values.get("model")
    named = [model.get(key) for key in ("path", "tokenizer")] if isinstance(model, Mapping) else []
    folders = [Path(name) for name in named if isinstance(name, str)]
    return _learning(values, folder / CONFIG), [*folders, folder / "checkpoint"]


def _learning(values: Mapping[str, Any], path: Path) -> LearningConfig | NotTrained:
    if "learning" not in values:
        return "the trees were not trained"
    try:
        return LearningConfig.model_validate(values["learning"])
    except ValidationError as error:
        fault = error.errors()[0]
        return f"{path}: learning.{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
