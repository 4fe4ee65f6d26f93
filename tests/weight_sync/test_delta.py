"""A delta gives the new weights bit for bit or is refused, and `disk` writes whole versions where it must."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.support.weight_sinks import FakeSink
from treepo.config.weights import WeightsConfig
from treepo.errors import EngineError
from treepo.weight_sync import delta
from treepo.weight_sync.delta import apply, encode
from treepo.weight_sync.disk import DiskAddress
from treepo.weight_sync.host_delta import ReceivedParts, SentParts
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import Outcome, WeightStream, open_sender
from treepo.weight_sync.shards import pieces
from treepo.weight_sync.wire import Box, Bucket, Manifest, Shards, TensorInfo

SECONDS = 20.0  # for a step: far more than any takes
BUCKET = 4096


def applied(old: np.ndarray, packed: bytes) -> np.ndarray:
    flat = torch.from_numpy(np.append(old, np.zeros(len(old) % 2, np.uint8)))
    apply(packed, flat)
    return flat.numpy()[: len(old)]


def changed(old: np.ndarray, share: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    flipped = generator.integers(1, 256, len(old), dtype=np.uint8)
    return old ^ np.where(generator.random(len(old)) < share, flipped, 0).astype(np.uint8)


@settings(deadline=None)
@given(
    st.integers(1, 5000),
    st.sampled_from([0.0, 0.001, 0.03, 0.5, 1.0]),
    st.sampled_from([64, 1024, 16 << 20]),
    st.integers(0, 99),
)
def test_the_old_bytes_and_the_delta_are_the_new_bytes(length, share, stripe, seed) -> None:
    old = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)
    new = changed(old, share, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "_STRIPE", stripe)
        assert applied(old, encode(old, new)).tobytes() == new.tobytes()


@pytest.mark.parametrize("places", [[], [0], [399_999], [254, 255, 256], [65_534, 65_535, 65_536, 300_000]])
def test_changes_may_be_far_apart(places: list[int]) -> None:
    old = np.zeros(400_001, dtype=np.uint8)
    new = old.copy()
    new[places] = 7
    packed = encode(old, new)
    assert applied(old, packed).tobytes() == new.tobytes()
    assert len(packed) < 400


def test_a_few_changed_weights_take_a_few_bytes() -> None:
    old = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)
    weights = old.copy().view(np.uint16)
    weights[np.random.default_rng(1).random(len(weights)) < 0.02] += 1
    assert len(encode(old, weights.view(np.uint8))) < len(old) / 40


@settings(deadline=None)
@given(st.data())
def test_a_damaged_delta_is_refused_or_gives_other_bytes(data: st.DataObject) -> None:
    """Other bytes have another checksum, by which the engine refuses them."""
    old = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8)
    new = changed(old, 0.05, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "_STRIPE", 1024)
        packed = bytearray(encode(old, new))
        kind = data.draw(st.sampled_from(["flip", "cut", "longer", "other"]))
        if kind == "flip":
            packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del packed[data.draw(st.integers(0, len(packed) - 1)) :]
        elif kind == "longer":
            packed += b"x"
        else:
            packed = bytearray(data.draw(st.binary(max_size=100)))
        try:
            result = applied(old, bytes(packed))
        except ValueError:
            return
        # zstd has bits that mean nothing: such a delta is as good as whole.
        assert len(result) == len(new)
        assert kind == "flip"


def model(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of all sizes and of mixed types, so that some are not aligned; one is larger than a bucket. Of
    the bfloat16 ones every bit pattern may occur, NaN with any payload too.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (7,), (40, 33), (1,), (2, 3, 4), (3 * BUCKET,), (11, 13), (5,), (300, 7)]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8]
    tensors = {}
    for index, shape in enumerate(shapes * 2):
        tensor = torch.empty(shape, dtype=dtypes[index % 3])
        raw = tensor.view(-1).view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
        tensors[f"tensor.{index}"] = tensor
    return tensors


def stepped(tensors: dict[str, Tensor], seed: int, share: float = 0.02) -> dict[str, Tensor]:
    """After a step that changed a share of the bytes."""
    after = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        after[name] = tensor.clone()
        raw = after[name].view(-1).view(torch.uint8)
        raw.copy_(torch.from_numpy(changed(raw.numpy().copy(), share, 100 * seed + number)))
    return after


def manifest_of(tensors: dict[str, Tensor]) -> Manifest:
    return tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


class Trainer:
    """Sends a model whose weights change a little in every step."""

    def __init__(self, folder: Path, transport: str, **config: object) -> None:
        self.folder = folder / "weights"
        weights = WeightsConfig.model_validate({"transport": transport, "delta": True, **config})
        self.stream = WeightStream(open_sender(weights, folder, "127.0.0.1", SECONDS), BUCKET, SECONDS)
        self.version, self.model = 0, model()

    def update(self, sinks: list[FakeSink], share: float = 0.02, *, again: bool = False) -> Outcome:
        self.version += not again
        self.model = stepped(self.model, self.version, share)
        for sink in sinks:
            sink.forget()
        source = LocalSource(self.model.items(), manifest_of(self.model))
        return self.stream.send(source, self.version, sinks)

    @property
    def wrote_delta(self) -> bool:
        """Whether the last version has deltas. Its smallest buckets are whole."""
        return any((self.folder / f"version-{self.version}").glob("*.delta"))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def trainer(transport: str, **config: object) -> Trainer:
        made.append(Trainer(tmp_path, transport, **config))
        return made[-1]

    yield trainer
    for one in made:
        one.stream.close()


@pytest.fixture
def disk(make: Callable[..., Trainer]) -> Callable[..., Trainer]:
    return partial(make, "disk")


@pytest.fixture
def hosts(make: Callable[..., Trainer]) -> Trainer:
    return make("host_broadcast")


@pytest.fixture
def sink() -> Iterator[Callable[..., FakeSink]]:
    made: list[FakeSink] = []

    def make(kind: type[FakeSink] = FakeSink, ranks: int = 1) -> FakeSink:
        made.append(kind(f"engine {len(made)}", ranks))
        return made[-1]

    yield make
    for one in made:
        one.close()


def assert_has(sink: FakeSink, tensors: dict[str, Tensor]) -> None:
    for received in sink.received:
        assert bits(received) == bits(tensors)


def test_every_rank_has_the_weights_bit_for_bit(disk, sink) -> None:
    trainer, engines = disk(full_every=4), [sink(ranks=2), sink()]
    for version in range(1, 10):
        outcome = trainer.update(engines)
        assert not outcome.failed
        for engine in engines:
            assert_has(engine, trainer.model)
        whole = version in (1, 5, 9)
        assert trainer.wrote_delta != whole
        assert len(outcome.remarks) == (not whole)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_may_change(disk, sink, share: float) -> None:
    trainer, engine = disk(), sink()
    for _ in range(3):
        trainer.update([engine], share)
        assert_has(engine, trainer.model)
    assert trainer.wrote_delta == (share == 0)  # random bytes cannot be compressed


def test_an_attempt_that_no_engine_survived_is_repeated(disk, sink) -> None:
    trainer, engine = disk(), sink()
    for again in (False, True, True, False, True):
        trainer.update([engine], again=again)
        assert_has(engine, trainer.model)


def test_a_base_is_replaced_when_deltas_are_larger_than_the_average_version(disk, sink) -> None:
    trainer, engine = disk(full_every=1000), sink()
    sizes: list[int] = []  # since the base, its own included
    for version in range(1, 30):
        trainer.update([engine], share=0.01)
        assert_has(engine, trainer.model)
        folder = trainer.folder / f"version-{version}"
        size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")
        due = not sizes or (len(sizes) > 1 and sizes[-1] > sum(sizes) / len(sizes))
        assert trainer.wrote_delta != due
        sizes = [size] if due else [*sizes, size]
    assert len(sizes) < 29  # it was replaced


class Spy(FakeSink):
    """Keeps the rounds of the last update."""

    rounds: list[Sequence[Bucket | None]]

    def forget(self) -> None:
        super().forget()
        self.rounds = []

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        self.rounds.append(buckets)
        return super().load(buckets)


def test_an_engine_that_missed_versions_can_load_a_delta(disk, sink) -> None:
    trainer, spy, late = disk(), sink(Spy), sink()
    for _ in range(3):
        trainer.update([spy])
    late.join([DiskAddress()]).result()
    partial, complete = trainer.folder / ".partial", trainer.folder / "version-3"
    shutil.copytree(complete, partial)  # where the files were while the engines loaded them
    for round_ in spy.rounds:
        late.load(round_).result()
    assert_has(late, trainer.model)


def test_the_version_after_an_engine_has_joined_or_failed_is_whole(disk, sink) -> None:
    trainer, first, second = disk(), sink(), sink()
    for _ in range(2):
        trainer.update([first])
    assert trainer.wrote_delta
    trainer.update([first, second])
    assert not trainer.wrote_delta
    trainer.update([first, second])
    assert trainer.wrote_delta
    trainer.update([first])
    assert not trainer.wrote_delta


def test_without_its_base_a_version_is_whole_and_the_log_says_so(disk, sink) -> None:
    trainer, engine = disk(), sink()
    for _ in range(2):
        trainer.update([engine])
    shutil.rmtree(trainer.folder / "version-1")
    (remark,) = trainer.update([engine]).remarks
    assert "version-1 is gone" in remark.text
    assert not trainer.wrote_delta
    assert_has(engine, trainer.model)


@pytest.mark.parametrize("damage", ["cut", "flip", "base"])
def test_a_damaged_file_is_refused_and_the_next_version_is_whole(disk, sink, damage: str) -> None:
    trainer = disk()

    class Damaged(FakeSink):
        def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
            (bucket,) = buckets
            assert bucket is not None
            file = Path(getattr(bucket.location, "path", ""))
            if trainer.version == 2 and damage == "base":
                file = Path(bucket.location.base.path)  # type: ignore[attr-defined]  # version 2 has deltas
            if trainer.version == 2 and file.exists():
                whole = file.read_bytes()
                at = len(whole) - 3
                flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
                file.write_bytes(whole[:-1] if damage == "cut" else flipped)
            return super().load(buckets)

    engine = sink(Damaged)
    assert not trainer.update([engine]).failed
    assert trainer.update([engine]).failed.keys() == {engine.name}
    assert not trainer.update([engine]).failed
    assert not trainer.wrote_delta
    assert_has(engine, trainer.model)


def test_what_a_killed_sender_left_is_removed_and_no_base_is_trusted(disk, sink) -> None:
    trainer, engine = disk(), sink()
    for _ in range(3):
        trainer.update([engine])
    (trainer.folder / ".partial").mkdir()
    (trainer.folder / ".partial" / "model-00000.delta").write_bytes(b"half")
    after = disk()  # another process of the trainer
    assert not (after.folder / ".partial").exists()
    after.version = 3
    after.update([engine])
    assert not after.wrote_delta
    assert_has(engine, after.model)


def read(folder: Path, version: int) -> dict[str, bytes]:
    """The weights of a version as its files say, by hand."""
    own, weights = folder / f"version-{version}", {}
    for file in own.glob("*.safetensors"):
        weights |= bits(load_file(file))
    for file in own.glob("*.delta"):
        base = orjson.loads((own / "delta.index.json").read_bytes())["metadata"]["base"]
        old = bits(load_file(folder / base / f"{file.stem}.safetensors"))
        order = sorted(old, key=lambda name: int(name.removeprefix("tensor.")))
        flat = np.frombuffer(b"".join(old[name] for name in order), dtype=np.uint8)
        new = applied(flat, file.read_bytes()).tobytes()
        for name in order:
            weights[name], new = new[: len(old[name])], new[len(old[name]) :]
    return weights


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_versions_and_their_bases_are_kept(disk, sink, keep: int) -> None:
    trainer, engine, sent = disk(keep=keep, full_every=3), sink(), {}
    for version in range(1, 12):
        trainer.update([engine])
        sent[version] = bits(trainer.model)
        newest = set(range(max(1, version - keep + 1), version + 1))
        bases = {(one - 1) // 3 * 3 + 1 for one in newest}
        names = {path.name for path in trainer.folder.iterdir()}
        assert names == {f"version-{one}" for one in newest | bases}
        for one in newest:
            assert read(trainer.folder, one) == sent[one]


def test_folders_of_other_names_are_left_alone(disk, sink) -> None:
    trainer, engine = disk(keep=1, full_every=3), sink()
    theirs = {"version-1-good", "version-final", "base-old", "notes"}
    for name in theirs:
        (trainer.folder / name).mkdir(parents=True)
    for _ in range(5):
        assert not trainer.update([engine]).failed
    assert {path.name for path in trainer.folder.iterdir()} == theirs | {"version-4", "version-5"}


def halves(rank: int, share: Manifest) -> Shards:
    """Rank 0 reads the first rows of what has rows, rank 1 the others."""
    boxes = {}
    for info in share:
        rows, *others = info.shape or (0,)
        half = (0, rows // 2) if rank == 0 else (rows // 2, rows)
        box: Box = (half, *((0, size) for size in others))
        boxes[info.name] = (box,) if half[0] < half[1] else ()
    return boxes


def assert_has_halves(sink: FakeSink, tensors: dict[str, Tensor]) -> None:
    for rank, received in enumerate(sink.received):
        reads = halves(rank, manifest_of(tensors))
        for name, tensor in tensors.items():
            for ours, theirs in zip(
                pieces(received[name], name, reads) if reads[name] else (),
                pieces(tensor, name, reads),
                strict=True,
            ):
                assert bits({name: ours.contiguous()}) == bits({name: theirs.contiguous()})


def test_hosts_get_what_changed_in_the_part_that_each_rank_reads(hosts: Trainer, sink) -> None:
    whole, divided = sink(), sink(ranks=2)
    divided.reads = halves
    for version in range(1, 7):
        # Random bytes cannot be compressed.
        outcome = hosts.update([whole, divided], share=1.0 if version == 4 else 0.01)
        assert not outcome.failed
        assert_has(whole, hosts.model)
        assert_has_halves(divided, hosts.model)
        assert len(outcome.remarks) == (version == 2)  # it is said once


def test_hosts_get_nothing_if_nothing_changed(hosts: Trainer, sink) -> None:
    engine = sink()
    remarks = []
    for _ in range(3):
        remarks += hosts.update([engine], share=0.0).remarks
        assert_has(engine, hosts.model)
    (remark,) = remarks
    sent, whole = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]+", remark.text))
    assert whole == sum(info.nbytes for info in manifest_of(hosts.model))
    assert sent < whole / 5  # the smallest buckets are sent whole


def test_hosts_get_a_whole_version_after_engines_have_joined_or_failed(hosts: Trainer, sink) -> None:
    first, second = sink(), sink()
    for engines, changes in (
        ([first], False),
        ([first], True),
        ([first, second], False),
        ([first, second], True),
        ([first], False),
    ):
        assert bool(hosts.update(engines).remarks) == changes
        for engine in engines:
            assert_has(engine, hosts.model)

    def refuse(number: str | int) -> None:
        if number == 2:
            raise EngineError("it refuses")

    first.fault = refuse
    assert hosts.update([first, second]).failed.keys() == {first.name}
    first.fault = lambda _: None
    for changes in (False, True):
        outcome = hosts.update([first, second])
        assert (outcome.failed, outcome.broken, bool(outcome.remarks)) == ({}, None, changes)
        for engine in (first, second):
            assert_has(engine, hosts.model)


def test_a_damaged_delta_ends_the_group() -> None:
    rng = np.random.default_rng(0)
    sent, received = SentParts(), ReceivedParts()
    part = torch.from_numpy(rng.integers(0, 256, 1001, dtype=np.uint8))
    message, delta = sent.message((0, 0), part)
    assert delta == 0
    received.room(0, 1001).copy_(message)
    part[::100] += 1
    message, delta = sent.message((0, 0), part)
    assert delta == len(message) < 1001
    with pytest.raises(RuntimeError, match="bucket 0"):
        received.changed(0, message[:-1], 1001)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transport": "colocated", "delta": True}, "disk and host_broadcast are allowed"),
        ({"transport": "host_broadcast", "delta": True, "full_every": 3}, "does nothing without delta"),
        ({"transport": "disk", "full_every": 3}, "does nothing without delta = true and transport = disk"),
    ],
)
def test_what_does_nothing_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightsConfig.model_validate(config)
