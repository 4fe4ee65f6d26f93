"""A weight update as one engine sees it: what must arrive, what has, and how SGLang is told.

A transaction: nothing is served from `begin` to `commit`. What was announced is checked against the model
before the first byte comes, every bucket by its checksum, and the commit needs every tensor once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import orjson
from safetensors import SafetensorError, safe_open

from treepo.errors import EngineError, ModelError
from treepo.weight_sync.wire import Manifest

_NAMED = 5  # names that an error message spells out
_OUTPUT = "lm_head.weight"


def checkpoint_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model folder, from its safetensors' headers. The output layer that
    some folders repeat although it is tied to the embedding is left out.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{model}: no *.safetensors in the folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelError(f"{file}: no readable safetensors file: {error}") from error
    if orjson.loads((model / "config.json").read_bytes()).get("tie_word_embeddings"):
        shapes.pop(_OUTPUT, None)
    return shapes


def check_manifest(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises EngineError unless the manifest names exactly the model's tensors, in their shapes: SGLang skips
    an unknown name silently, and a wrong shape is found only after half of the weights are overwritten.
    """
    check_names([tensor.name for tensor in manifest], shapes, "the model's")
    for tensor in manifest:
        if tensor.shape != shapes[tensor.name]:
            raise EngineError(
                f"weights: {tensor.name} has shape {tensor.shape}, the model's is {shapes[tensor.name]}"
            )


def check_names(arrived: Sequence[str], expected: Iterable[str], whose: str) -> None:
    """Raises EngineError unless exactly the expected tensors are there, each once."""
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


class Update:
    """One update under way. manifest: what it consists of."""

    def __init__(self, version: int, manifest: Manifest) -> None:
        self.version, self._manifest = version, manifest
        self._arrived: list[str] = []

    @property
    def touched(self) -> bool:
        """Whether some of the old weights may be gone."""
        return bool(self._arrived)

    def arrives(self, tensors: Manifest) -> None:
        """Tensors are about to be loaded. Raises EngineError for one that was not announced so."""
        if unknown := set(tensors) - set(self._manifest):
            raise EngineError(
                f"weights: {_spelled(sorted(tensor.name for tensor in unknown))}: not as announced"
            )
        self._arrived += [tensor.name for tensor in tensors]

    def check_complete(self) -> None:
        """Raises EngineError unless every tensor has arrived once."""
        check_names(self._arrived, [tensor.name for tensor in self._manifest], "the announced")
