"""A model that is small enough to make on the spot, and what transformers computes with it.

Random weights: a check asks whether two computations agree, not whether the model is any good.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from treepo.toy.warmstart import new_model

_BEFORE, _AFTER = 0, 1  # seeds


class Toy:
    """dtype: of engine and trainer on this machine. tolerance: of a log-prob between two of its
    implementations; weights of the one seed and of the other differ by many times that.
    """

    def __init__(self, folder: Path) -> None:
        cuda = torch.cuda.is_available()
        self.dtype = "bfloat16" if cuda else "float32"
        # Log-probs are near -5.6; an order more than what is seen in float32, and a few units of bfloat16.
        self.tolerance = 0.05 if cuda else 1e-4
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

    def difference(self, scores: np.ndarray, others: np.ndarray) -> float:
        return float(np.abs(scores - others).max())
