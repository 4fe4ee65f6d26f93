"""A weight sync as one engine sees it: the tensors that must arrive and those that have.

The announced tensors are checked against the model before the first byte arrives, and the commit needs each
of them exactly once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from treepo.config.trainer import LoraConfig
from treepo.data.model_config import CONFIG, read_json_object
from treepo.data.peft_names import peft_name
from treepo.data.weight_headers import read_weight_headers
from treepo.errors import EngineError
from treepo.weight_sync.wire import Manifest

_NAMED = 5  # names that an error message spells out
_OUTPUT = "lm_head.weight"


def checkpoint_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an update of the model in this folder has.

    Leaves out an output layer that is tied to the embedding, which some folders store again. Raises
    ModelError.
    """
    shapes = {name: header.shape for name, header in read_weight_headers(model).items()}
    if read_json_object(model / CONFIG).get("tie_word_embeddings"):
        shapes.pop(_OUTPUT, None)
    return shapes


def adapter_shapes(weights: Mapping[str, tuple[int, ...]], lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an update of an adapter beside these weights has."""
    shapes = {}
    for name, shape in weights.items():
        if name.endswith(".weight") and name.split(".")[-2] in lora.targets:
            rows, columns = shape
            shapes[peft_name(name, "A")] = (lora.rank, columns)
            shapes[peft_name(name, "B")] = (rows, lora.rank)
    return shapes


def check_manifest(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise EngineError unless the manifest has exactly the expected tensors, in their shapes.

    SGLang would silently skip an unknown name, and would find a wrong shape only after overwriting other
    weights.
    """
    check_names([tensor.name for tensor in manifest], shapes, "the model's")
    for tensor in manifest:
        if tensor.shape != shapes[tensor.name]:
            raise EngineError(
                f"weights: {tensor.name} has shape {tensor.shape}, the model's is {shapes[tensor.name]}"
            )


def check_names(arrived: Sequence[str], expected: Iterable[str], whose: str) -> None:
    """Raise EngineError unless exactly the expected tensors have arrived, each once."""
    wanted, faults = set(expected), []
    if missing := sorted(wanted - set(arrived)):
        faults.append(f"{len(missing)} missing: {_spelled(missing)}")
    if unexpected := sorted(set(arrived) - wanted):
        faults.append(f"{len(unexpected)} unexpected: {_spelled(unexpected)}")
    if repeated := sorted(name for name, count in Counter(arrived).items() if count > 1):
        faults.append(f"{len(repeated)} repeated: {_spelled(repeated)}")
    if faults:
        raise EngineError(f"weights: of {whose} {len(wanted)} tensors " + "; ".join(faults))


def _spelled(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


class WeightUpdate:
    """A weight update that has begun. manifest: its tensors."""

    def __init__(self, version: int, manifest: Manifest) -> None:
        self.version, self._manifest = version, manifest
        self._arrived: list[str] = []

    @property
    def touched(self) -> bool:
        """Whether old weights may have been overwritten."""
        return bool(self._arrived)

    def add(self, tensors: Manifest) -> None:
        """Count tensors that are about to be loaded. Raises EngineError for one that was not announced."""
        if unknown := set(tensors) - set(self._manifest):
            raise EngineError(
                f"weights: {_spelled(sorted(tensor.name for tensor in unknown))}: not as announced"
            )
        self._arrived += [tensor.name for tensor in tensors]

    def check_complete(self) -> None:
        """Raise EngineError unless every tensor has arrived exactly once."""
        check_names(self._arrived, [tensor.name for tensor in self._manifest], "the announced")
