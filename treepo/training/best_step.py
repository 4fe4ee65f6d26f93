"""Which step of a run is the best by `evaluation.best`.

It is the first step with the highest accuracy among those that were evaluated and have a checkpoint. So it
follows from metrics.jsonl and the folders in `checkpoints/`: a run that resumes cuts the former back, and
finds it again. `checkpoints/best.json` names it for people and other programs; a run only writes it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from treepo.config.run import RunConfig
from treepo.data.output_folder import write_file
from treepo.training.metrics import heldout_metric

MARKER = "best.json"


class BestStep:
    """The accuracies of a run's steps. earlier: the lines of metrics.jsonl before a resume."""

    def __init__(self, config: RunConfig, earlier: Iterable[Mapping[str, float | None]] = ()) -> None:
        assert config.best_set is not None
        assert config.evaluation.every is not None
        self._every = config.evaluation.every
        self._metric = heldout_metric(config.best_set, "accuracy")
        self._accuracies: dict[int, float] = {}
        for metrics in earlier:
            self.evaluated(int(metrics["step"] or 0), metrics)

    def due(self, step: int) -> bool:
        """Whether the step is evaluated, and so needs a checkpoint."""
        return step % self._every == 0

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Note the metrics of a step, if the accuracy is among them."""
        if (accuracy := metrics.get(self._metric)) is not None and math.isfinite(accuracy):
            self._accuracies[step] = accuracy

    def of(self, steps: Iterable[int]) -> int | None:
        """The best of these steps; None if none of them was evaluated."""
        return max(
            sorted(self._accuracies.keys() & set(steps)), key=self._accuracies.__getitem__, default=None
        )

    def accuracy(self, step: int) -> float:
        """The accuracy after a step that was evaluated."""
        return self._accuracies[step]

    def mark(self, folder: Path, step: int | None) -> None:
        """Write the marker into the folder of checkpoints, or remove it if no step is the best. Raises
        OSError.
        """
        marker = folder / MARKER
        if step is None:
            marker.unlink(missing_ok=True)
            return
        content = json.dumps({"step": step, "metric": self._metric, "value": self._accuracies[step]}) + "\n"
        if not marker.is_file() or marker.read_bytes() != content.encode():
            write_file(marker, content)
