"""Weight transports between threads: every byte arrives, and an engine's fault stays its own."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from tests.support.weight_sinks import CPU, FakeSink, reads_all, reasons
from treepo.config.weights import WeightsConfig
from treepo.errors import EngineError, TransportError
from treepo.weight_sync import colocated, wire
from treepo.weight_sync.colocated import ColocatedSender
from treepo.weight_sync.colocated_receiver import ColocatedReceiver
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import Outcome, WeightStream, open_sender
from treepo.weight_sync.shards import views
from treepo.weight_sync.wire import Bucket, Manifest, Sender, TensorInfo, checksums, plan_buckets

TRANSPORTS = ("colocated", "broadcast", "host_broadcast", "disk")
SECONDS = 20.0  # for a step: far more than any takes
BUCKET = 4096


def random_model(seed: int) -> dict[str, Tensor]:
    """Tensors of all sizes and of mixed types, so that some are not aligned; one is larger than a bucket."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (7,), (40, 33), (1,), (2, 3, 4), (3 * BUCKET,), (11, 13), (5,)]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8]
    return {
        f"tensor.{index}": (torch.randn(shape, generator=generator) * 100).to(dtypes[index % 3])
        for index, shape in enumerate(shapes * 2)
    }


def manifest_of(tensors: dict[str, Tensor]) -> Manifest:
    return tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_stream(tmp_path: Path) -> Iterator[Callable[..., WeightStream]]:
    made: list[WeightStream] = []

    def make(transport: str, seconds: float = SECONDS) -> WeightStream:
        config = WeightsConfig(transport=transport)  # type: ignore[arg-type]  # one of them
        made.append(WeightStream(open_sender(config, tmp_path, "127.0.0.1", seconds), BUCKET, seconds))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


@pytest.fixture
def make_sinks() -> Iterator[Callable[..., list[FakeSink]]]:
    made: list[FakeSink] = []

    def make(*ranks: int) -> list[FakeSink]:
        made.extend(FakeSink(f"engine {len(made)}", count) for count in ranks)
        return made[-len(ranks) :]

    yield make
    for sink in made:
        sink.close()


def send(
    stream: WeightStream, tensors: dict[str, Tensor], sinks: Sequence[FakeSink], version: int = 1
) -> Outcome:
    for sink in sinks:
        sink.forget()
    return stream.send(LocalSource(tensors.items(), manifest_of(tensors)), version, sinks)


def assert_has(sink: FakeSink, tensors: dict[str, Tensor]) -> None:
    for received in sink.received:
        assert received.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert received[name].dtype == tensor.dtype
            assert torch.equal(received[name], tensor), name


def test_every_tensor_reaches_every_rank_update_after_update(transport, make_stream, make_sinks) -> None:
    stream, sinks = make_stream(transport), make_sinks(1, 2, 1)
    for seed in range(2):
        model = random_model(seed)
        assert send(stream, model, sinks) == Outcome()
        for sink in sinks:
            assert_has(sink, model)
            sink.forget()
    others = [sinks[1], *make_sinks(1)]  # one stays, two go, one comes
    model = random_model(2)
    assert send(stream, model, others) == Outcome()
    for sink in others:
        assert_has(sink, model)


@pytest.mark.parametrize("stage", ["join", 0, 3])
def test_an_engine_that_refuses_hurts_no_other(transport, stage, make_stream, make_sinks) -> None:
    """Engines that share a collective lose it together, and begin again without the one at fault."""
    seconds = 3.0 if transport.endswith("broadcast") else SECONDS  # after which a broken collective ends
    stream, sinks = make_stream(transport, seconds), make_sinks(1, 2, 1)
    model = random_model(0)

    def refuse(at: str | int) -> None:
        if at == stage:
            raise EngineError("no")

    sinks[1].fault = refuse
    read = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal read
        for item in model.items():
            read += 1
            yield item

    outcome = stream.send(LocalSource(counted(), manifest_of(model)), 1, sinks)
    assert reasons(outcome) == {"engine 1": "no"}
    assert read == len(model), "the trainer's other ranks would wait"
    innocent = [sinks[0], sinks[2]]
    if transport.endswith("broadcast"):
        assert outcome.broken
        assert send(stream, model, innocent) == Outcome()
    else:
        assert outcome.broken is None
    for sink in innocent:
        assert_has(sink, model)


def test_if_every_engine_fails_the_tensors_are_still_read(transport, make_stream, make_sinks) -> None:
    stream, sinks = make_stream(transport, 3.0), make_sinks(1, 1)

    def refuse(at: str | int) -> None:
        raise EngineError(f"no {at}")

    for sink in sinks:
        sink.fault = refuse
    model = random_model(0)
    source = iter(model.items())
    outcome = stream.send(LocalSource(source, manifest_of(model)), 1, sinks)
    assert set(outcome.failed) == {"engine 0", "engine 1"}
    assert next(source, None) is None


@pytest.mark.parametrize("largest", [100, 5 * BUCKET])
def test_two_buckets_and_one_tensor_are_all_that_is_held(
    make_stream, make_sinks, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    """Joined tensors are dropped one by one. The bytes that are held at one time are counted.

    The buffers are kept for the next update, until the stream is closed.
    """
    stream, sinks = make_stream("colocated"), make_sinks(1)
    sizes = [400] * 100 + [largest] + [400] * 100
    infos = tuple(TensorInfo(f"t{index}", "uint8", (size,)) for index, size in enumerate(sizes))
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    in_buffers = most = 0

    class Counted(colocated.SharedBytes):
        def __init__(self, nbytes: int) -> None:
            nonlocal in_buffers
            super().__init__(nbytes)
            in_buffers += nbytes

        def close(self) -> None:
            nonlocal in_buffers
            super().close()
            in_buffers -= len(self.bytes)

    def joined() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for info in infos:
            assert len(alive) <= 1, "the tensor before the last is still held"
            tensor = torch.zeros(info.shape, dtype=torch.uint8)
            alive.add(tensor)
            most = max(most, in_buffers + len(tensor))
            yield info.name, tensor
            del tensor

    monkeypatch.setattr(colocated, "SharedBytes", Counted)
    stream.send(LocalSource(joined(), infos), 1, sinks)
    assert len(sinks[0].received[0]) == len(infos)
    assert most <= BUCKET + max(BUCKET, largest) + max(sizes)
    stream.close()
    assert in_buffers == 0


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 5000))
def test_buckets_are_the_tensors_in_order_and_bounded(sizes: list[int], size: int) -> None:
    manifest = tuple(TensorInfo(str(index), "uint8", (count,)) for index, count in enumerate(sizes))
    planned = plan_buckets(manifest, size)
    assert tuple(tensor for bucket in planned for tensor in bucket) == manifest
    for bucket in planned:
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket) <= size
    for first, second in pairwise(planned):  # none could have been fuller
        assert sum(tensor.nbytes for tensor in first) + second[0].nbytes > size


@given(st.integers(1, 40_000), st.data())
def test_the_checksum_notices_what_can_go_wrong_on_the_way(count: int, data: st.DataObject) -> None:
    flat = torch.from_numpy(np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8))
    value = checksums(flat)
    assert value == checksums(flat.clone())
    changed = flat.clone()
    changed[data.draw(st.integers(0, count - 1))] ^= data.draw(st.integers(1, 255))
    assert checksums(changed) != value
    if count >= 2 * 4096:  # rows in another order, as when a bucket is written while it is read
        row = data.draw(st.integers(1, count // 4096 - 1)) * 4096
        swapped = torch.cat([flat[row : row + 4096], flat[4096:row], flat[:4096], flat[row + 4096 :]])
        assert checksums(swapped) != value
    shifted = torch.cat([flat[1:], flat[:1]])
    assert torch.equal(shifted, flat) or checksums(shifted) != value


@given(st.integers(1, 70_000), st.integers(0, 4), st.integers(1, 5))
def test_each_stripe_has_its_checksum(count: int, first: int, step: int) -> None:
    """Computed for all stripes at once, against one by one; for a share of them too."""
    flat = torch.from_numpy(np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_STRIPE", 8192)
        one_by_one = [checksums(stripe) for stripe in flat.split(8192)]
        assert checksums(flat) == tuple(value for (value,) in one_by_one)
        first %= len(one_by_one)
        assert checksums(flat, slice(first, None, step)) == checksums(flat)[first::step]


def test_a_torn_bucket_is_not_loaded(make_stream, make_sinks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that change after the checksum, as in a buffer that is written while it is read."""
    start = ColocatedSender.start

    def torn(self: ColocatedSender, index: int, flat: Tensor, tensors: Manifest):
        if index == 1:
            flat[len(flat) // 2] += 1
        return start(self, index, flat, tensors)

    monkeypatch.setattr(ColocatedSender, "start", torn)
    outcome = send(make_stream("colocated"), random_model(0), make_sinks(1))
    assert "checksum" in reasons(outcome)["engine 0"]


def test_a_folder_that_cannot_be_written_is_one_error_after_all_tensors_are_read(
    tmp_path: Path, make_stream, make_sinks
) -> None:
    """The trainer's other ranks would wait for ever."""
    stream, sinks = make_stream("disk"), make_sinks(1)
    (tmp_path / "weights").write_text("a file where the folder should be")
    source = iter((model := random_model(0)).items())
    with pytest.raises(TransportError, match=r"weights of version 1: .*weights"):
        stream.send(LocalSource(source, manifest_of(model)), 1, sinks)
    assert next(source, None) is None


def test_a_version_on_disk_is_complete_or_absent(tmp_path: Path, make_stream, make_sinks) -> None:
    stream, sinks = make_stream("disk"), make_sinks(1)
    folder = tmp_path / "weights"

    def refuse(at: str | int) -> None:
        if at == 2:
            assert not list(folder.glob("version-*"))
            raise EngineError("no")

    sinks[0].fault = refuse
    model = random_model(0)
    assert send(stream, model, sinks).failed
    assert not list(folder.iterdir())
    sinks[0].fault = lambda _: None
    for version in (9, 10, 11):
        model = random_model(version)
        assert send(stream, model, sinks, version) == Outcome()
    assert sorted(path.name for path in folder.iterdir()) == ["version-10", "version-11"]
    found = {}
    for file in (folder / "version-11").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  no mapping
    assert all(torch.equal(found[name], tensor) for name, tensor in model.items())
    assert found.keys() == model.keys()
    assert send(stream, model, sinks, 5) == Outcome()
    assert [path.name for path in folder.iterdir()] == ["version-5"], (
        "the run went back: others are abandoned"
    )


def test_shared_memory_is_gone_with_its_sender() -> None:
    sender: Sender = ColocatedSender(CPU)
    (address,) = sender.addresses([1])
    receiver = address.join(0, CPU, reads_all)
    flat = sender.buffer(0, 64)
    flat.fill_(7)
    infos = (TensorInfo("x", "uint8", (64,)),)
    bucket = Bucket(infos, (checksums(flat),), sender.start(0, flat, infos))
    receiver.begin(bucket)
    ((_, tensor),) = views(receiver.receive(bucket), infos)
    assert bool((tensor == 7).all())
    sender.close()
    with pytest.raises(RuntimeError, match="same process namespace"):
        address.join(0, CPU, reads_all)
    with pytest.raises(RuntimeError):
        ColocatedReceiver(CPU, address, 0).receive(bucket)
