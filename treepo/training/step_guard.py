"""Ends a run whose optimizer steps fail or ruin the weights, before an engine, a checkpoint or the final
model gets them. The trainer itself skips a step whose loss or gradient is not finite.
"""

import logging
from collections.abc import Sequence

from treepo.config.run import RunConfig
from treepo.data.output_folder import write_file
from treepo.errors import DivergedError
from treepo.learning.soundness import ruin
from treepo.protocols import BatchResult, was_taken
from treepo.training.checkpoints import saved_step
from treepo.tree import Tree, to_json

_log = logging.getLogger(__name__)


class StepGuard:
    """Checks each step's result; counts the skipped optimizer steps in a row since the run's last start."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._in_a_row = 0

    def check(self, step: int, trees: Sequence[Tree], result: BatchResult) -> None:
        """Log each skipped optimizer step, in one line.

        trees: that the step trained. Raises DivergedError after `trainer.max_skipped_steps` skipped ones in a
        row, with the trees saved beside the run's files, and if the step has ruined the weights.
        """
        for number, update in enumerate(result.updates, start=1):
            if was_taken(update):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            which = f"optimizer step {number} of {len(result.updates)}"
            found = f"the gradient's norm is {update['grad_norm']}, the loss {update['loss']}"
            _log.warning("step %d: %s was skipped: %s", step, which, found)
            if self._in_a_row >= self._config.trainer.max_skipped_steps:
                raise DivergedError(
                    f"step {step}: {found}, in {self._in_a_row} optimizer steps in a row "
                    "(trainer.max_skipped_steps); none of them changed the weights. The trees of this step "
                    f"are in {self._save(step, trees)}. {self._advice()}"
                )
        if result.weights is not None and (what := ruin(result.weights)) is not None:
            used = result.taken[-1]["learning_rate"]
            raise DivergedError(
                f"step {step} has ruined the weights: {what}. Its learning rate was {used:.3g}. No engine "
                f"has them, and no checkpoint. {self._advice()}"
            )

    def _advice(self) -> str:
        rate = f"trainer.optimizer.learning_rate, now {self._config.trainer.optimizer.learning_rate:g}"
        saved = saved_step(self._config.out)
        if saved is None:
            return f"There is no checkpoint: begin again with a lower {rate}"
        return f"Continue after step {saved}: --resume with a lower {rate}"

    def _save(self, step: int, trees: Sequence[Tree]) -> str:
        """Write the trees to a file that no resumed run cuts; return its name, or why there is none."""
        path = self._config.out / f"skipped-step-{step:05d}.jsonl"
        try:
            write_file(path, "".join(to_json(tree, step=step).decode() for tree in trees))
        except OSError as error:
            return f"no file ({error.filename}: {error.strerror})"
        return str(path)
