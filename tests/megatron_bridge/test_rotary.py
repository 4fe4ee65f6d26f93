"""Rotary embeddings agree with transformers, with and without Llama 3's scaling."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_bridge.rotary import cos_sin, inverse_frequency, rotate, rotated


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "llama3"],
)
def test_rotation_is_that_of_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(head_dim=16, rope_parameters=rope, max_position_embeddings=4096)
    position = torch.tensor([0, 1, 2, 63, 64, 65, 1000, 4095])
    x = torch.randn(len(position), 3, 16)
    ours = rotate(x, *cos_sin(position, inverse_frequency(rope, 16)))
    cos, sin = LlamaRotaryEmbedding(config)(x, position[None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    # Float32 holds an angle of 4095 rad to 2.4e-4 rad. The two sides differ in the frequency's last bit: that
    # moves this angle by a few such steps, and the first six, of up to 65 rad, by 1/60 of it.
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=0, atol=2e-3)
    torch.testing.assert_close(ours[:6], theirs[0].transpose(0, 1)[:6], rtol=0, atol=2e-5)


def test_half_precision_is_rotated_in_float32() -> None:
    """The result is rounded once; its gradient too."""
    cos, sin = cos_sin(torch.arange(1000), inverse_frequency({"rope_theta": 1e4}, 16))
    x = torch.randn(1000, 3, 16).bfloat16().requires_grad_()
    gradient = torch.randn(1000, 3, 16).bfloat16()
    ours = rotate(x, cos, sin)
    wide = x.detach().float().requires_grad_()
    exact = rotate(wide, cos, sin)
    assert torch.equal(ours, exact.bfloat16())
    (back,) = torch.autograd.grad(ours, x, gradient)
    assert torch.equal(back, torch.autograd.grad(exact, wide, gradient.float())[0].bfloat16())


def test_the_gradient_is_that_of_plain_operations() -> None:
    cos, sin = cos_sin(torch.arange(7), inverse_frequency({"rope_theta": 1e4}, 8).double())
    x = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x, cos, sin))
    assert torch.autograd.gradcheck(rotated, (x, cos, sin))
