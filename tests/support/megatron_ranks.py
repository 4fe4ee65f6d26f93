"""Real Megatron-Core ranks over gloo for the tests: one group of processes runs all cases of its size.

The processes come from a fork server that has imported Megatron-Core, so a rank starts in a fraction of a
second and still begins as a clean process.
"""

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.config.learning import LearningConfig
from treepo.config.trainer import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from treepo.errors import ModelError
from treepo.learning.mismatch import LogProbMismatch
from treepo.learning.packing import Pack, head
from treepo.learning.soundness import WeightCheck
from treepo.protocols import BatchResult, was_taken
from treepo.weight_sync.lanes import MOST_LANES
from treepo.weight_sync.wire import TensorInfo

DEADLINE = 1800  # seconds until some rank of a group must have ended

# With these Adam's step is the learning rate times the gradient. Plain Adam divides by the gradient's size,
# which turns rounding noise in a gradient of almost 0 into a full step.
LINEAR = OptimizerConfig(learning_rate=1.0, warmup_steps=0, epsilon=1.0, betas=[0.0, 0.0], weight_decay=0.0)

Life = tuple[str, Callable[..., Any], Any]
"""A name, the function that every rank runs (of case, layout, rank, store, folder), and its case."""


@dataclass(frozen=True)
class Case:
    """One trainer's life. steps: each replica's packs, for each optimizer step. chunk_bytes: of logits at
    once. spoilt: packs of each replica for a first step that must be skipped: the gradient is not finite.
    offload: as if engines took the device before every step; what is away is read then too.
    """

    name: str
    model: Path
    steps: Sequence[Sequence[Sequence[Pack]]]
    denominator: float
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    temperature: float = 1.0
    dtype: str = "float32"
    recompute: str = "none"
    optimizer: OptimizerConfig = LINEAR
    learning: LearningConfig = field(default_factory=LearningConfig)
    chunk_bytes: int = 1 << 29
    routing_replay: str = "none"
    spoilt: Sequence[Sequence[Pack]] = ()
    offload: Literal["none", "optimizer", "all"] | None = None
    lora: LoraConfig | None = None


@dataclass
class Result:
    """before, after: the log-probs of the first step's packs, replica by replica. initial, final: weights by
    their Hugging Face names. export: the folder that was written at the end. reference: the log-probs of the
    first step's packs by the reference model, computed before `after`; empty without a KL term. adapters:
    at the end, by PEFT's names; empty without `lora`.
    """

    before: list[list[np.ndarray]]
    metrics: list[dict[str, float]]
    after: list[list[np.ndarray]]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    export: Path
    reference: list[list[np.ndarray]]
    adapters: dict[str, Tensor]


@dataclass(frozen=True)
class BatchCase:
    """A trainer that learns from one batch, without old log-probs. mini_batches: each replica's packs and the
    denominator. by_hand: log-probs, reference and each optimizer step are asked for one by one.
    """

    name: str
    model: Path
    mini_batches: Sequence[tuple[Sequence[Sequence[Pack]], float]]
    layout: ParallelConfig
    learning: LearningConfig
    by_hand: bool
    recompute: str = "none"
    routing_replay: str = "none"
    lora: LoraConfig | None = None


def run(cases: Sequence[Case | BatchCase], folder: Path) -> dict[str, Any]:
    """Run every case at its own layout, all of the same number of ranks; raises if a rank does. Returns
    each one's Result, or a BatchCase's BatchResult and final weights.
    """
    assert len({case.layout.ranks for case in cases}) == 1
    lives = [(case.name, _learn if isinstance(case, BatchCase) else _live, case) for case in cases]
    return run_lives(lives, cases[0].layout, folder)


def run_lives(lives: Sequence[Life], layout: ParallelConfig, folder: Path) -> dict[str, Any]:
    """Return what rank 0 returns for each life, by name; raises if a rank does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_bridge.trainer"])
    folder.mkdir()
    ports = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, list(lives), layout, folder, ports))
        for rank in range(layout.ranks)
    ]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running and (ended := wait(list(running), timeout=DEADLINE)):
        if any(running.pop(int(sentinel)).exitcode for sentinel in ended):  # type: ignore[arg-type]  # all are ints
            break  # the others would wait for it
    for process in processes:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * layout.ranks, f"exit codes {codes}: see the ranks' output above"
    return {name: pickle.loads((folder / f"{name}.pickle").read_bytes()) for name, *_ in lives}


def weights_of(trainer) -> dict[str, Tensor]:
    """The tensors that would be sent to engines, on rank 0; they are those that the manifest announces."""
    named = [(name, tensor.clone()) for name, tensor in trainer.tensors()]
    infos = tuple(TensorInfo.of(name, tensor) for name, tensor in named)
    assert infos == (trainer.manifest() if torch.distributed.get_rank() == 0 else ())
    for lanes in (2, MOST_LANES):
        everyone = sent_in_lanes(trainer, lanes)
        if named:
            assert sorted(name for name, _ in everyone) == sorted(name for name, _ in named)
            assert all(torch.equal(tensor, dict(named)[name]) for name, tensor in everyone)
    return dict(named)


def sent_in_lanes(trainer, lanes: int) -> list[tuple[str, Tensor]]:
    """What all lanes send, one lane after another; on every rank. Each round's tensors are those planned."""
    source = trainer.weight_source(lanes)
    mine: list[tuple[str, Tensor]] = []
    for planned, tensors in source.rounds(4096):
        joined = [(name, tensor.clone()) for name, tensor in tensors]
        expected = planned[source.lane] if source.lane is not None else ()
        assert tuple(TensorInfo.of(name, tensor) for name, tensor in joined) == expected
        mine += joined
    everyone: list[list[tuple[str, Tensor]]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    assert source.lanes == min(lanes, len(everyone))
    assert sum(1 for sent in everyone if sent) == source.lanes
    return list(chain.from_iterable(everyone))


def _rank(rank: int, lives: list[Life], layout: ParallelConfig, folder: Path, ports) -> None:
    from megatron_bridge.trainer import create_store

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*not writable")  # torch's, of memory that it may not write
    for number, (name, live, case) in enumerate(lives):
        if rank == 0:
            store = create_store()
            for _ in range(layout.ranks - 1):
                ports.put((number, store.port))
        else:
            of_case, port = ports.get()
            assert of_case == number
            store = TCPStore("127.0.0.1", port, is_master=False)
        result = live(case, layout, rank, store, folder)
        if rank == 0:
            (folder / f"{name}.pickle").write_bytes(pickle.dumps(result))


def _live(case: Case, _: ParallelConfig, rank: int, store, folder: Path) -> Result:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from megatron_bridge import log_prob
    from megatron_bridge.trainer import MegatronTrainer

    layout = case.layout
    log_prob.CHUNK_BYTES = case.chunk_bytes
    for pack in chain.from_iterable(chain.from_iterable(case.steps)):
        for column in pack.columns().values():
            column.flags.writeable = False  # as from Ray's object store
    config = TrainerConfig(
        parallel=layout,
        optimizer=case.optimizer,
        recompute=case.recompute,  # type: ignore[arg-type]  # one of its literals
        offload=case.offload or "none",
        routing_replay=case.routing_replay,  # type: ignore[arg-type]  # likewise
        lora=case.lora,
    )
    trainer = MegatronTrainer(case.model, case.dtype, config, case.learning, rank, layout.ranks, store)
    assert not RouterReplay.global_router_replay_instances  # they would outlive the trainer
    replica = layout.replica(rank)

    def everyone(packs: Sequence[Sequence[Pack]], compute=trainer.log_probs) -> list[list[np.ndarray]]:
        gathered: list[tuple[int, list[np.ndarray]]] = [(0, [])] * layout.ranks
        mine = (replica, compute(packs[replica], case.temperature))
        torch.distributed.all_gather_object(gathered, mine)
        by_replica: list[list[np.ndarray]] = []
        for index in range(layout.data):
            first, *others = [arrays for owner, arrays in gathered if owner == index]
            for other in others:  # every rank of a replica must return the same
                assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
            by_replica.append(first)
        return by_replica

    trainer.warm_up()
    initial = weights_of(trainer)
    before = everyone(case.steps[0])
    if case.spoilt:
        skipped = trainer.train_step(case.spoilt[replica], case.temperature, case.denominator)
        assert not was_taken(skipped)  # on every rank
    metrics = []
    for number, packs in enumerate(case.steps):
        if case.offload is not None:
            _offload(trainer, folder / f"{case.name}-{number}")
        metrics.append(trainer.train_step(packs[replica], case.temperature, case.denominator))
    reference = everyone(case.steps[0], trainer.reference_log_probs) if case.learning.kl_coefficient else []
    after = everyone(case.steps[0])
    final = weights_of(trainer)
    adapters = {name: tensor.clone() for name, tensor in trainer.adapters()}
    export = folder / f"{case.name}-export"
    trainer.export(export)
    with pytest.raises(ModelError):  # likewise
        trainer.export(export)
    trainer.close()
    return Result(before, metrics, after, initial, final, export, reference, adapters)


def _offload(trainer, checkpoint: Path) -> None:
    """Offload and reload. Meanwhile a checkpoint is written and loaded, and the weights are read."""
    before = weights_of(trainer)
    trainer.offload(weights=False)
    trainer.offload(weights=True)
    trainer.save(checkpoint, {})
    trainer.finish_save()
    trainer.load(checkpoint)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(trainer).items())
    trainer.reload()


def _learn(
    case: BatchCase, _: ParallelConfig, rank: int, store, folder: Path
) -> tuple[BatchResult, dict[str, Tensor]]:
    from megatron_bridge.trainer import CHECKED_TOKENS, MegatronTrainer

    del folder
    layout, temperature = case.layout, 0.8
    replica = layout.replica(rank)
    config = TrainerConfig(
        parallel=layout,
        optimizer=LINEAR,
        recompute=case.recompute,  # type: ignore[arg-type]  # one of its literals
        routing_replay=case.routing_replay,  # type: ignore[arg-type]  # likewise
        lora=case.lora,
    )
    trainer = MegatronTrainer(case.model, "float32", config, case.learning, rank, layout.ranks, store)
    shares = [(packs[replica], denominator) for packs, denominator in case.mini_batches]
    if not case.by_hand:
        result = trainer.train_batch(shares, temperature)
        assert set(result.seconds) == {"log_probs", "train"}
    else:
        batch = [_with(packs, "old_log_prob", trainer.log_probs(packs, temperature)) for packs, _ in shares]
        if case.learning.kl_coefficient:
            batch = [
                _with(packs, "reference_log_prob", trainer.reference_log_probs(packs, temperature))
                for packs in batch
            ]
        mismatch = [LogProbMismatch()] * layout.ranks
        torch.distributed.all_gather_object(mismatch, LogProbMismatch.of(chain.from_iterable(batch)))
        firsts = range(0, layout.stage_ranks, layout.replica_ranks)  # a rank of each replica
        updates = [
            trainer.train_step(packs, temperature, denominator)
            for packs, (_, denominator) in zip(batch, case.mini_batches, strict=True)
        ]
        last = [head(pack, CHECKED_TOKENS) for pack in batch[-1][:1]]
        mine: list[tuple[np.ndarray, np.ndarray]] = []
        for pack, now in zip(last, trainer.log_probs(last, temperature), strict=True):
            assert pack.old_log_prob is not None
            trained = pack.count_pos + pack.count_neg > 0
            mine.append((now[trained], pack.old_log_prob[trained]))
        checked: list[list[tuple[np.ndarray, np.ndarray]]] = [[]] * layout.ranks
        torch.distributed.all_gather_object(checked, mine)
        pairs = list(chain.from_iterable(checked[first] for first in firsts))
        values, earlier = (np.concatenate([pair[index] for pair in pairs]) for index in (0, 1))
        largest = max((float(tensor.abs().max()) for tensor in weights_of(trainer).values()), default=0.0)
        check = WeightCheck(largest, float(values.mean()), float(earlier.mean()), len(values))
        mismatch = sum((mismatch[first] for first in firsts), LogProbMismatch())
        result = BatchResult(updates, mismatch, {}, check)
    final = weights_of(trainer)
    trainer.close()
    return result, final


def _with(packs: Sequence[Pack], field: str, values: Sequence[np.ndarray]) -> list[Pack]:
    return [replace(pack, **{field: value}) for pack, value in zip(packs, values, strict=True)]
