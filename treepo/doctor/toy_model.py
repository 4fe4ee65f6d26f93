"""A toy model with random weights, and its log-probs according to transformers.

The engine and trainer checks compare their log-probs with these: they ask whether two computations agree, not
whether the model is good.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from treepo.toy.warmstart import new_model

_OLD, _NEW = 0, 1  # seeds

# Between two implementations' values of one log-prob, about -5.6. Observed on a CPU: 1e-6, and 0.005 in
# bfloat16, which rounds a logit to 1/256 of itself. Log-probs of the two seeds differ by 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def native_dtype() -> str:
    """bfloat16 on GPUs, whose kernels are not made for float32; float32 on CPUs."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def random_tokens() -> np.ndarray:
    """A sequence to compute log-probs of: int32 [T]."""
    return np.random.default_rng(0).integers(0, 256, 48).astype(np.int32)


class Toy:
    """A model in `folder`, and the weights of another seed to update it to.

    dtype: of engine and trainer. tolerance: the largest difference of a log-prob between two implementations.
    tokens: int32 [T], a random sequence to compute log-probs of.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.dtype = dtype
        self.tolerance = TOLERANCE[dtype]
        self.folder = folder
        self.tokens = random_tokens()
        new_model(_OLD).save_pretrained(folder)

    def new_weights(self) -> dict[str, Tensor]:
        """The weights of the other seed, by Hugging Face name."""
        weights = new_model(_NEW).state_dict()
        return {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in weights.items()}

    def log_probs(self, tokens: np.ndarray, *, new: bool = False) -> np.ndarray:
        """float32 [T-1]: of each token but the first, given those before it."""
        # Rounded to the dtype first, so that only the computation differs.
        model = new_model(_NEW if new else _OLD).to(getattr(torch, self.dtype)).float()
        path = torch.from_numpy(tokens).long()
        with torch.no_grad():
            log_probs = model(path[None]).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(1, path[1:, None])[:, 0].numpy()


def max_difference(log_probs: np.ndarray, others: np.ndarray) -> float:
    """The largest absolute difference over tokens; nan if any value is nan."""
    return float(np.abs(log_probs - others).max())
