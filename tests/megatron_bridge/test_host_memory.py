"""What is offloaded comes back bit for bit, and can be read and written on the host meanwhile."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bridge.host_memory import OptimizerState, Weights, locked_like


def chunk_of(*buffers: Tensor) -> Any:
    """A model chunk as Megatron-Core's DDP leaves it: parameters are views of flat buffers, with gaps."""
    parameters = []
    for buffer in buffers:
        parameters += [
            torch.nn.Parameter(buffer[:6].view(2, 3)),
            torch.nn.Parameter(buffer[64:69]),
        ]
    held = [SimpleNamespace(param_data=buffer) for buffer in buffers]
    return SimpleNamespace(
        buffers=held[:1], expert_parallel_buffers=held[1:], parameters=lambda: iter(parameters)
    )


@pytest.fixture
def chunk() -> Any:
    """Weights and experts' weights, of two dtypes and with values whose every bit counts."""
    return chunk_of(torch.randn(128), torch.randn(70).bfloat16())


def test_weights_come_back_as_they_were(chunk) -> None:
    weights = Weights([chunk])
    before = [parameter.detach().clone() for parameter in chunk.parameters()]
    for _ in range(2):  # the host's copy is used again
        weights.give_back()
        weights.give_back()  # changes nothing
        assert all(parameter.untyped_storage().nbytes() == 0 for parameter in chunk.parameters())
        weights.take()
        assert all(map(torch.equal, chunk.parameters(), before))
        with torch.no_grad():
            for parameter, value in zip(chunk.parameters(), before, strict=True):
                parameter.mul_(-3)
                value.mul_(-3)


def test_weights_that_are_away_are_read_and_written_on_the_host(chunk) -> None:
    """As a checkpoint is saved and loaded. The parameters stay the same objects and views."""
    weights = Weights([chunk])
    before = [parameter.detach().clone() for parameter in chunk.parameters()]
    weights.give_back()
    with weights.readable(), torch.no_grad():
        assert all(map(torch.equal, chunk.parameters(), before))
        for parameter in chunk.parameters():
            parameter.add_(1)
    assert all(parameter.untyped_storage().nbytes() == 0 for parameter in chunk.parameters())
    weights.take()
    assert all(torch.equal(now, old + 1) for now, old in zip(chunk.parameters(), before, strict=True))
    assert torch.equal(chunk.buffers[0].param_data[64:69], before[1] + 1)


def test_weights_that_are_here_are_read_where_they_are(chunk) -> None:
    weights = Weights([chunk])
    with weights.readable(), torch.no_grad():
        next(chunk.parameters()).fill_(7.0)
    assert (chunk.buffers[0].param_data[:6] == 7).all()


def adam(chunk: Any, own_master: bool) -> Any:
    """The optimizer's part of a rank: master weights are its own, or views of float32 weights."""
    masters = [
        parameter.detach().view(-1).float().clone() if own_master else parameter.detach().view(-1)
        for parameter in chunk.parameters()
    ]
    optimizer = torch.optim.AdamW(masters, lr=0.1, fused=True)
    for master in masters:
        master.grad = torch.randn_like(master)
    optimizer.step()
    return SimpleNamespace(optimizer=optimizer, masters=masters)


@pytest.mark.parametrize("own_master", [True, False])
def test_optimizer_state_comes_back_and_steps_as_without(own_master: bool) -> None:
    results = []
    for offloads in (False, True):
        torch.manual_seed(0)
        chunk = chunk_of(torch.randn(128))
        part = adam(chunk, own_master)
        memory = OptimizerState(part, Weights([chunk]))
        for _ in range(2):
            if offloads:
                places = [master.data_ptr() for master in part.masters]
                memory.give_back()
                moved = [master.data_ptr() for master in part.masters]
                assert (moved != places) == own_master
                memory.take()
            part.optimizer.step()
        state = [value for of in part.optimizer.state.values() for value in of.values()]
        results.append([*part.masters, *state])
    assert all(map(torch.equal, *results))


def test_locked_memory_has_the_tensors_types_and_shapes() -> None:
    like = [torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(7), torch.empty(0), torch.empty(2, 2)]
    copies = locked_like(like)
    for number, (copy, tensor) in enumerate(zip(copies, like, strict=True)):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        copy.fill_(number)
    assert all((copy == number).all() for number, copy in enumerate(copies))
    assert locked_like([]) == []
