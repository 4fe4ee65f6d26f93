"""The colocated transport's ways: which one is chosen, what the log says, what is copied and freed."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support.fake_cuda import GPU, FakeCuda
from tests.support.weight_sinks import CPU, FakeSink, reads_all
from treepo.weight_sync import wire
from treepo.weight_sync.colocated import ColocatedSender, Way
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import Outcome, WeightStream
from treepo.weight_sync.wire import Bucket, TensorInfo, checksums

BUCKET = 4096
MODEL = {f"tensor {index}": torch.full((1500,), index, dtype=torch.uint8) for index in range(9)}
LARGEST = 4 * 1500  # of the buffers of MODEL: two tensors in a bucket, two buckets


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def make_sinks() -> Iterator[Callable[..., list[FakeSink]]]:
    made: list[FakeSink] = []

    def make(*ranks: int, device: torch.device = GPU) -> list[FakeSink]:
        made.extend(FakeSink(f"engine {index}", count, device=device) for index, count in enumerate(ranks))
        return made

    yield make
    for sink in made:
        sink.close()


def update(stream: WeightStream, sinks: list[FakeSink], model: dict[str, Tensor] = MODEL) -> Outcome:
    """One update; every tensor reaches every rank."""
    for sink in sinks:
        sink.forget()
    manifest = tuple(TensorInfo.of(name, tensor) for name, tensor in model.items())
    outcome = stream.send(LocalSource(model.items(), manifest), 1, sinks)
    for sink in sinks:
        for received in sink.received:
            assert received.keys() == model.keys()
            assert all(torch.equal(received[name], tensor) for name, tensor in model.items())
    return outcome


def stream_of(sender: ColocatedSender) -> WeightStream:
    return WeightStream(sender, BUCKET, 20.0)


def test_ranks_that_can_open_the_gpus_memory_take_weights_from_it(cuda: FakeCuda, make_sinks) -> None:
    sender, sinks = ColocatedSender(GPU), make_sinks(1, 2)
    stream = stream_of(sender)
    outcome = update(stream, sinks)
    assert sender.way == "ipc"
    assert [(remark.level, remark.text) for remark in outcome.remarks] == [
        (logging.INFO, "weights travel by CUDA IPC to all 3 ranks of the engines")
    ]
    assert update(stream, sinks).remarks == [], "once is enough"
    assert cuda.copied == []
    assert cuda.registered == []
    assert cuda.allocated == {}, "the engines' caches need the memory"
    stream.close()


@pytest.mark.parametrize(
    ("fault", "level", "reason"),
    [
        ({"broken": "cudaIpcOpenMemHandle: cudaErrorMapBufferObjectFailed"}, logging.WARNING,
         "cudaIpcOpenMemHandle: cudaErrorMapBufferObjectFailed"),
        ({"corrupt": True}, logging.WARNING, "it reads other bytes there"),
        ({"topology": "no NVLink"}, logging.INFO, "no NVLink"),
    ],
)  # fmt: skip
def test_if_a_rank_cannot_all_take_them_from_registered_host_memory(
    cuda: FakeCuda, make_sinks, fault, level, reason
) -> None:
    for name, value in fault.items():
        setattr(cuda, name, value)
    sender, sinks = ColocatedSender(GPU), make_sinks(1)
    stream = stream_of(sender)
    outcome = update(stream, sinks)
    assert sender.way == "registered"
    assert [(remark.level, remark.text) for remark in outcome.remarks] == [
        (level, f"weights travel through host memory, not by CUDA IPC: {reason} (1 of 1 ranks)")
    ]
    assert len(cuda.registered) == 4, "two buffers, each mapped by sender and receiver"
    assert update(stream, sinks).remarks == []
    assert len(cuda.registered) == 4, "kept for the next update: registering takes long"
    assert cuda.allocated == {}
    stream.close()
    sinks[0].close()
    assert cuda.registered == []


@pytest.mark.usefixtures("cuda")
def test_a_rank_on_the_cpu_takes_weights_from_host_memory(make_sinks) -> None:
    sender, (on_cpu,) = ColocatedSender(GPU), make_sinks(1, device=CPU)
    outcome = update(stream_of(sender), [on_cpu])
    assert sender.way == "registered"
    assert "it computes on the CPU" in outcome.remarks[0].text
    sender.close()


def test_memory_that_cuda_does_not_register_is_pageable_and_the_log_says_so_once(
    cuda: FakeCuda, make_sinks
) -> None:
    cuda.topology, cuda.unregistrable = "no NVLink", "cudaHostRegister: cudaErrorNotSupported"
    sender, sinks = ColocatedSender(GPU), make_sinks(1)
    stream = stream_of(sender)
    *_, remark = update(stream, sinks).remarks
    assert sender.way == "pageable"
    assert remark.level == logging.WARNING
    assert "which CUDA does not register: cudaHostRegister: cudaErrorNotSupported" in remark.text
    assert update(stream, sinks).remarks == []
    stream.close()


@pytest.mark.parametrize("free", [0, LARGEST // 2], ids=["none", "one-buffer"])
def test_a_full_gpu_sends_from_host_memory(cuda: FakeCuda, make_sinks, monkeypatch, free: int) -> None:
    sender, sinks = ColocatedSender(GPU), make_sinks(1)
    addresses = sender.addresses

    def fill(ranks):
        made = addresses(ranks)
        cuda.free = free
        return made

    monkeypatch.setattr(sender, "addresses", fill)
    outcome = update(stream_of(sender), sinks)
    assert sender.way == "registered"
    assert outcome.remarks[-1].level == logging.WARNING
    assert "no memory for two buckets (cudaMalloc: cudaErrorMemoryAllocation)" in outcome.remarks[-1].text
    sender.close()


@pytest.mark.parametrize("best", ["ipc", "registered", "pageable"])
def test_a_measurement_chooses_its_way(cuda: FakeCuda, make_sinks, best: Way) -> None:
    sender = ColocatedSender(GPU, best)
    update(stream_of(sender), make_sinks(1, 1))
    assert sender.way == best
    assert bool(cuda.registered) == (best == "registered")
    sender.close()


def test_a_rank_of_several_copies_only_slices_of_a_bucket(cuda: FakeCuda, make_sinks) -> None:
    """It hands SGLang the mapped memory; a rank alone needs every byte, and copies the bucket at once."""
    cuda.topology = "no NVLink"
    sender = ColocatedSender(GPU)
    alone, several = make_sinks(1, 2)
    update(stream_of(sender), [alone, several])
    assert sum(cuda.copied) == sum(tensor.nbytes for tensor in MODEL.values())
    sender.close()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stripes", [1, 2, 7, 8, 9])
def test_ranks_that_read_the_same_memory_check_all_of_it_together(
    monkeypatch: pytest.MonkeyPatch, ranks: int, stripes: int
) -> None:
    """A byte that changes is noticed, and every rank checks something: it may have mapped another buffer."""
    monkeypatch.setattr(wire, "_STRIPE", 4096)
    sender = ColocatedSender(CPU)
    (address,) = sender.addresses([ranks])
    receivers = [address.join(rank, CPU, reads_all) for rank in range(ranks)]
    nbytes = 4096 * stripes - 5
    flat = sender.buffer(0, nbytes)
    flat.copy_(torch.arange(nbytes) % 251)
    sums = checksums(flat)
    assert len(sums) == stripes
    bucket = Bucket((TensorInfo("x", "uint8", (nbytes,)),), (sums,), sender.start(0, flat, ()))

    def noticed() -> list[bool]:
        chosen = [(each.receive(bucket), each.stripes(bucket)) for each in receivers]
        return [checksums(received, stripe) != sums[stripe] for received, stripe in chosen]

    assert not any(noticed())
    for stripe in range(stripes):
        flat[4096 * stripe + 7] += 1
        assert any(noticed())
        flat[4096 * stripe + 7] -= 1
    flat += 1
    assert all(noticed())
    sender.close()


def test_an_engine_that_joins_later_is_asked_again(cuda: FakeCuda, make_sinks) -> None:
    sender, sinks = ColocatedSender(GPU), make_sinks(1, 1)
    stream = stream_of(sender)
    update(stream, sinks[:1])
    assert sender.way == "ipc"
    cuda.broken = "cudaIpcOpenMemHandle: cudaErrorInvalidResourceHandle"
    update(stream, sinks)
    assert sender.way == "registered"
    cuda.broken = ""
    update(stream, sinks[1:])
    assert sender.way == "ipc"
    stream.close()
