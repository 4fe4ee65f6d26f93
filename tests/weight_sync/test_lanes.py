"""Several lanes send one model: every tensor arrives once, and whatever fails in a lane ends all of them."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.lane_threads import manifest_of, send_in_lanes, thread_sources
from tests.support.weight_sinks import FakeSink, reasons
from treepo.config.weights import WeightsConfig
from treepo.errors import EngineError, TransportError
from treepo.weight_sync.broadcast import BroadcastSender
from treepo.weight_sync.lanes import by_size, deal, source_ranks
from treepo.weight_sync.send import Outcome, WeightStream, open_sender
from treepo.weight_sync.shards import union, whole
from treepo.weight_sync.wire import Box, Manifest, Shards

LANES = 3
BUCKET = 4096
COLLECTIVE = ("broadcast", "host_broadcast")
TRANSPORTS = (*COLLECTIVE, "colocated")


def random_model(seed: int) -> dict[str, Tensor]:
    """Tensors of all sizes and of mixed types; one is larger than a bucket."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (7,), (40, 33), (1,), (2, 3, 4), (3 * BUCKET,), (11, 13), (5,), (30, 50)]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8]
    return {
        f"tensor.{index}": (torch.randn(shape, generator=generator) * 100).to(dtypes[index % 3])
        for index, shape in enumerate(shapes * 3)
    }


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_streams(tmp_path: Path) -> Iterator[Callable[..., list[WeightStream]]]:
    made: list[WeightStream] = []

    def make(transport: str, seconds: float = 20.0) -> list[WeightStream]:
        config = WeightsConfig(transport=transport)  # type: ignore[arg-type]  # one of them
        made.extend(
            WeightStream(open_sender(config, tmp_path, "127.0.0.1", seconds), BUCKET, seconds)
            for _ in range(LANES)
        )
        return made[-LANES:]

    yield make
    for stream in made:
        stream.close()


@pytest.fixture
def sinks() -> Iterator[list[FakeSink]]:
    made = [FakeSink(f"engine {index}", ranks) for index, ranks in enumerate((1, 2, 1))]
    yield made
    for sink in made:
        sink.close()


def assert_have(sinks: Sequence[FakeSink], model: dict[str, Tensor]) -> None:
    for sink in sinks:
        for received in sink.received:
            assert received.keys() == model.keys()
            assert all(torch.equal(received[name], tensor) for name, tensor in model.items())


def test_every_tensor_arrives_once_update_after_update(transport, make_streams, sinks) -> None:
    streams = make_streams(transport)
    for seed, present in enumerate([sinks, sinks, sinks[1:]]):
        model = random_model(seed)
        for sink in present:
            sink.forget()
        outcomes = send_in_lanes(streams, thread_sources(model, LANES), present)
        assert outcomes == [Outcome()] * LANES
        assert_have(present, model)


def halves(rank: int, share: Manifest) -> Shards:
    """Rank 0 reads the first half of each tensor's rows, rank 1 the others, both what has no rows."""
    boxes: dict[str, tuple[Box, ...]] = {}
    for info in share:
        boxes[info.name] = whole(info)
        if info.shape:
            middle = info.shape[0] // 2
            rows = (0, middle) if rank == 0 else (middle, info.shape[0])
            boxes[info.name] = union([(rows, *((0, size) for size in info.shape[1:]))])
    return boxes


@pytest.mark.parametrize("transport", COLLECTIVE)
def test_each_rank_gets_the_parts_that_it_reads(transport: str, make_streams, sinks) -> None:
    """The ranks of one engine read halves, those of others whole tensors."""
    sinks[1].reads = halves
    streams, model = make_streams(transport), random_model(0)
    for _ in range(2):
        for sink in sinks:
            sink.forget()
        assert send_in_lanes(streams, thread_sources(model, LANES), sinks) == [Outcome()] * LANES
        assert_have([sinks[0], sinks[2]], model)
        for rank, received in enumerate(sinks[1].received):
            reads = halves(rank, manifest_of(model))
            assert received.keys() == {name for name, boxes in reads.items() if boxes}
            for name, tensor in received.items():
                (box,) = reads[name]
                index = tuple(slice(start, stop) for start, stop in box)
                assert tensor[index].equal(model[name][index])


@pytest.mark.parametrize("stage", ["join", 0, 2])
def test_an_engine_that_fails_is_left_out_in_all_lanes(transport, stage, make_streams, sinks) -> None:
    streams = make_streams(transport, 3.0 if transport in COLLECTIVE else 20.0)
    model = random_model(0)

    def refuse(at: str | int) -> None:
        if at == stage:
            raise EngineError("no")

    sinks[1].fault = refuse
    outcome, *_ = send_in_lanes(streams, thread_sources(model, LANES), sinks)
    assert isinstance(outcome, Outcome)
    assert reasons(outcome) == {"engine 1": "no"}
    others = [sinks[0], sinks[2]]
    if transport in COLLECTIVE:
        assert outcome.broken == "engine 1: no", "not what the others lost by it"
        for sink in others:
            sink.forget()
        assert send_in_lanes(streams, thread_sources(model, LANES), others) == [Outcome()] * LANES
    assert_have(others, model)


def test_an_engine_without_memory_is_at_fault(
    transport, make_streams, sinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a collective as well, where the others only lose the transfer."""
    streams = make_streams(transport, 3.0 if transport in COLLECTIVE else 20.0)
    receiver: Any = sinks[1]._receivers[0]
    join = receiver.join

    def join_without_memory(*arguments: Any) -> None:
        join(*arguments)
        lane = receiver._lanes[0]

        def receive(_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

        monkeypatch.setattr(lane, "receive", receive)

    monkeypatch.setattr(receiver, "join", join_without_memory)
    outcome, *_ = send_in_lanes(streams, thread_sources(random_model(0), LANES), sinks)
    assert isinstance(outcome, Outcome)
    said = reasons(outcome)["engine 1"]
    assert said.startswith("no memory for the weights that arrive: a smaller weights.bucket_mb or engine.mem")
    assert said.endswith("(CUDA out of memory. Tried to allocate 2 GiB.)")
    assert outcome.failed.keys() == {"engine 1"}
    assert not isinstance(outcome.failed["engine 1"], TransportError)
    assert outcome.broken == (f"engine 1: {said}" if transport in COLLECTIVE else None)


@pytest.mark.parametrize("lane", range(LANES))
@pytest.mark.parametrize("step", ["buffer", "addresses", "filled", "start", "end"])
def test_a_lane_that_fails_ends_the_update_in_all(
    transport, lane: int, step: str, make_streams, sinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane raises its error, lane 0 says that the update is broken, and the next update succeeds."""
    streams = make_streams(transport, 3.0)
    model = random_model(0)
    sender: Any = streams[lane]._sender
    calls = 0

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("out of memory")
        return original(*arguments)

    original = getattr(sender, step)
    monkeypatch.setattr(sender, step, fail)
    outcomes = send_in_lanes(streams, thread_sources(model, LANES), sinks)
    assert str(outcomes[lane]) == "out of memory"
    others = [outcome for other, outcome in enumerate(outcomes) if other != lane]
    assert all(isinstance(outcome, Outcome) for outcome in others)
    if lane > 0:
        assert others[0] == Outcome(broken=f"lane {lane}: out of memory")
    for sink in sinks:
        sink.forget()
    assert send_in_lanes(streams, thread_sources(model, LANES), sinks) == [Outcome()] * LANES
    assert_have(sinks, model)


def test_each_lane_s_remarks_reach_the_log_once(make_streams, sinks) -> None:
    streams = make_streams("colocated")
    for lane, stream in enumerate(streams):
        sender: Any = stream._sender
        sender._remark(20, "slowly")
        sender._remark(20, f"from lane {lane}")
    outcome, *_ = send_in_lanes(streams, thread_sources(random_model(0), LANES), sinks)
    assert isinstance(outcome, Outcome)
    texts = [remark.text for remark in outcome.remarks]
    assert texts == [
        f"weights travel {said}" for said in ("slowly", *(f"from lane {i}" for i in range(LANES)))
    ]


def test_a_lane_s_transport_that_breaks_is_no_engine_s_fault(
    make_streams, sinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = make_streams("broadcast", 3.0)
    model = random_model(0)
    sender = streams[2]._sender
    assert isinstance(sender, BroadcastSender)
    start: Callable[..., Any] = sender.start

    def break_off(index: int, *arguments: Any) -> Any:
        if index == 1:
            sender.close()  # the engines lose the group in the middle of it
        return start(index, *arguments)

    monkeypatch.setattr(sender, "start", break_off)
    outcomes = send_in_lanes(streams, thread_sources(model, LANES), sinks)
    assert isinstance(outcomes[0], Outcome)
    assert outcomes[0].broken
    assert not outcomes[0].failed
    monkeypatch.undo()
    for sink in sinks:
        sink.forget()
    assert send_in_lanes(streams, thread_sources(model, LANES), sinks) == [Outcome()] * LANES
    assert_have(sinks, model)


def test_after_a_failure_every_lane_still_gathers_every_tensor(make_streams, sinks) -> None:
    """The trainer's ranks would wait for it."""
    streams, model = make_streams("colocated"), random_model(0)
    sources = thread_sources(model, LANES)
    gathered: list[str] = []
    for source in sources:
        source.gathered = lambda _, name: gathered.append(name)

    def refuse(at: str | int) -> None:
        raise EngineError(f"no {at}")

    for sink in sinks:
        sink.fault = refuse
    outcome, *_ = send_in_lanes(streams, sources, sinks)
    assert isinstance(outcome, Outcome)
    assert set(outcome.failed) == {sink.name for sink in sinks}
    assert sorted(gathered) == sorted(model)


def test_an_error_while_ranks_gather_ends_without_a_meeting(make_streams, sinks) -> None:
    """The other ranks are in the same collective, and end with it."""
    streams, model = make_streams("colocated"), random_model(0)
    sources = thread_sources(model, LANES)

    def lose(lane: int, _: str) -> None:
        if lane == 1:
            sources[0].shared.abort()
            raise RuntimeError("a rank of the trainer is gone")

    for source in sources:
        source.gathered = lose
    outcomes = send_in_lanes(streams, sources, sinks)
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)


@given(st.data())
def test_parameters_are_dealt_to_lanes_that_may_send_them(data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.integers(1, 1000), max_size=60))
    able = [data.draw(st.sets(st.integers(0, lanes - 1), min_size=1)) for _ in sizes]
    chosen = deal(sizes, [sorted(one) for one in able])
    assert len(chosen) == len(sizes)
    assert all(lane in may for lane, may in zip(chosen, able, strict=True))
    assert sorted(by_size(sizes)) == list(range(len(sizes)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_lanes_differ_by_less_than_the_largest_parameter(sizes: list[int], lanes: int) -> None:
    chosen = deal(sizes, [range(lanes)] * len(sizes))
    loads = [0] * lanes
    for size, lane in zip(sizes, chosen, strict=True):
        loads[lane] += size
    assert max(loads) - min(loads) <= max(sizes)
    assert sum(loads) == sum(sizes)


@given(st.integers(1, 600), st.integers(1, 16))
def test_sources_are_distinct_ranks_and_rank_0_is_the_first(ranks: int, lanes: int) -> None:
    sources = source_ranks(range(ranks), lanes)
    assert len(set(sources)) == len(sources) == min(ranks, lanes)
    assert sources[0] == 0
    assert max(sources) < ranks
    distances = [after - before for before, after in pairwise(sources)]
    assert not distances or max(distances) - min(distances) <= 1
