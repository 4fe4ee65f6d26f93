"""Muon in float32: momentum with its direction made orthogonal, for the matrices of a network.

torch.optim.Muon iterates in bfloat16. A CPU without bfloat16 instructions emulates it 25 times slower, which
would add six minutes to the toy. The iteration and its coefficients are Keller Jordan's
(https://kellerjordan.github.io/posts/muon).
"""

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Move the singular values of `matrix` near 1 (about 0.7 to 1.2) and keep its directions."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    linear, cubic, quintic = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum, with steps of the size of Adam's at the same rate.

    A parameter is a matrix, or a stack of them [experts, rows, columns].
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # takes no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                gradient = parameter.grad.lerp(momentum, _MOMENTUM)
                for matrix, change in zip(_matrices(parameter), _matrices(gradient), strict=True):
                    # The entries of an orthogonal matrix are about 1/sqrt(larger side), those of Adam's step
                    # 0.2.
                    scale = 0.2 * max(matrix.shape) ** 0.5
                    matrix.add_(orthogonalize(change), alpha=-scale * group["lr"])


def _matrices(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrix, or those of the experts that one parameter holds."""
    return (parameter,) if parameter.ndim == 2 else parameter.unbind()
