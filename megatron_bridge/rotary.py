"""Rotary position embeddings at explicit positions, computed as in transformers (halves, not pairs)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_bridge.fusion import fused

ROPE_TYPES = ("default", "llama3")


def inverse_frequency(rope: Mapping[str, object], head_dim: int) -> Tensor:
    """The radians of each dimension per position: float32 [head_dim / 2].

    rope: `rope_parameters` of a Hugging Face config, of one of ROPE_TYPES.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1.0 / float(rope["rope_theta"]) ** exponent  # type: ignore[arg-type]  # JSON number
    kind = rope.get("rope_type", "default")
    assert kind in ROPE_TYPES, kind
    return _llama3(frequency, rope) if kind == "llama3" else frequency


def _llama3(frequency: Tensor, rope: Mapping[str, object]) -> Tensor:
    """Llama 3.1's scaling: stretches long wavelengths by `factor`, keeps short ones, interpolates between."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, context = (float(rope[name]) for name in names)  # type: ignore[arg-type]  # numbers
    periods = context * frequency / (2 * math.pi)  # turns of each dimension within the old context
    share = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequency / factor + share * frequency


def cos_sin(position_T: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, head_dim / 2] of every token's angles, in the frequency's dtype: float32, as in
    SGLang and transformers.
    """
    angle = position_T[:, None, None].to(frequency.dtype) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [T, heads, head_dim] by the angles of `cos_sin`. Keeps no activation."""
    return _Rotation.apply(x, cos, sin)  # type: ignore[return-value]  # torch leaves `apply` untyped


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`, in plain operations for the compiler, which fuses them. Any leading dimensions."""
    left, right = x.chunk(2, dim=-1)
    new_left = (left * cos).addcmul_(right, sin, value=-1)
    new_right = (right * cos).addcmul_(left, sin)
    return torch.cat([new_left, new_right], dim=-1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return fused(rotated)(x, cos, sin)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return fused(rotated)(grads[0], cos, -sin), None, None
