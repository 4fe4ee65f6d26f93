"""How the terminal shows the accuracies on held-out sets."""

from collections.abc import Iterator, Mapping

from treepo.config.heldout import HELDOUT
from treepo.training.metrics import evaluated_sets, heldout_metric


def accuracies(metrics: Mapping[str, float | None]) -> Iterator[str]:
    """The accuracy on each set with its standard error, such as "math 0.531 ± 0.031".

    The set of `data.heldout` has no name if it is alone. metrics: of an evaluation, as in metrics.jsonl.
    """
    names = evaluated_sets(metrics)
    for name in names:
        accuracy, error = (
            metrics.get(heldout_metric(name, metric)) for metric in ("accuracy", "standard_error")
        )
        text = "no answer could be graded" if accuracy is None or accuracy != accuracy else f"{accuracy:.3f}"
        if error is not None and error == error:
            text += f" ± {error:.3f}"
        yield text if names == [HELDOUT] else f"{name} {text}"
