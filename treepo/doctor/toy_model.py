"""A model that is small enough to make on the spot, and what transformers computes with it.

Random weights: a check asks whether two computations agree, not whether the model is any good.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from treepo.toy.warmstart import new_model

_BEFORE, _AFTER = 0, 1  # seeds


# Of a log-prob near -5.6 between two implementations. Seen on a CPU: 1e-6, and 0.005 in bfloat16, which
# rounds logits to 1/256 of themselves. The log-probs of the two seeds differ by 1.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def dtype_here() -> str:
    """What engines and trainers of this machine compute in: GPU kernels are not made for float32."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


class Toy:
    """The model of one seed in `folder`, and that of another to change its weights to. dtype: of engine and
    trainer. tolerance: of a log-prob between two of its implementations. tokens: something to score.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.dtype = dtype
        self.tolerance = _TOLERANCE[dtype]
        self.folder = folder
        self.tokens = np.random.default_rng(0).integers(0, 256, 48).astype(np.int32)
        new_model(_BEFORE).save_pretrained(folder)

    def new_weights(self) -> dict[str, Tensor]:
        """Those of the other seed."""
        weights = new_model(_AFTER).state_dict()
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in weights.items()}

    def log_probs(self, tokens: np.ndarray, *, new: bool = False) -> np.ndarray:
        """float32 [T-1], each token's but the first given those before it."""
        # Rounded to the dtype first: what is compared is the computation.
        model = new_model(_AFTER if new else _BEFORE).to(getattr(torch, self.dtype)).float()
        path = torch.from_numpy(tokens).long()
        with torch.no_grad():
            scores = model(path[None]).logits[0, :-1].log_softmax(-1)
        return scores.gather(1, path[1:, None])[:, 0].numpy()


def difference(scores: np.ndarray, others: np.ndarray) -> float:
    """The largest of any token."""
    return float(np.abs(scores - others).max())
