"""Real Megatron-Core ranks over gloo for the tests: one group of processes runs all cases of its size.

The processes come from a fork server that has Megatron-Core imported, so that a rank starts in a fraction
of a second and still begins with a clean process.
"""

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.config.learning import LearningConfig
from treepo.config.trainer import OptimizerConfig, ParallelConfig, TrainerConfig
from treepo.errors import ModelError
from treepo.learning.packing import Pack
from treepo.weight_sync.wire import TensorInfo

DEADLINE = 600  # seconds until some rank of a group must have ended

# Adam's step is then the learning rate times the gradient: the plain one divides it by its own size, which
# turns rounding noise in a gradient of almost 0 into a full step.
LINEAR = OptimizerConfig(learning_rate=1.0, warmup_steps=0, epsilon=1.0, betas=[0.0, 0.0], weight_decay=0.0)

Life = tuple[str, Callable[..., Any], Any]
"""A name, what every rank runs (a module's function of case, layout, rank, store, folder), and its case."""


@dataclass(frozen=True)
class Case:
    """One trainer's life. steps: for each optimizer step and replica its packs; the last step's weights are
    kept, and all log-probs before and after. chunk_bytes: of logits at once. spoilt: for each replica packs
    whose step must fail, before the others, because the gradient is not finite.
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
    spoilt: Sequence[Sequence[Pack]] = ()


@dataclass
class Result:
    """before, after: the log-probs of the first step's packs, replica by replica. initial, final: weights by
    their Hugging Face names. export: the folder that was written in the end. reference: the first step's
    log-probs by the reference model, asked for before `after`; empty without a KL term.
    """

    before: list[list[np.ndarray]]
    metrics: list[dict[str, float]]
    after: list[list[np.ndarray]]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    export: Path
    reference: list[list[np.ndarray]]


def run(cases: Sequence[Case], folder: Path) -> dict[str, Result]:
    """Every case at its own layout, all of equally many ranks; raises where a rank does."""
    assert len({case.layout.ranks for case in cases}) == 1
    return run_lives([(case.name, _live, case) for case in cases], cases[0].layout, folder)


def run_lives(lives: Sequence[Life], layout: ParallelConfig, folder: Path) -> dict[str, Any]:
    """What rank 0 returns of each life, by name; raises where a rank does."""
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
    """What would be sent to engines, by its Hugging Face names: on rank 0, and as it is announced."""
    named = [(name, tensor.clone()) for name, tensor in trainer.tensors()]
    infos = tuple(TensorInfo.of(name, tensor) for name, tensor in named)
    assert infos == (trainer.manifest() if torch.distributed.get_rank() == 0 else ())
    return dict(named)


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
    )
    trainer = MegatronTrainer(case.model, case.dtype, config, case.learning, rank, layout.ranks, store)
    # Ranks count tensor parallelism fastest, then data, then pipeline.
    replica = rank // layout.tensor % layout.data

    def everyone(packs: Sequence[Sequence[Pack]], score=trainer.log_probs) -> list[list[np.ndarray]]:
        gathered: list[tuple[int, list[np.ndarray]]] = [(0, [])] * layout.ranks
        mine = (replica, score(packs[replica], case.temperature))
        torch.distributed.all_gather_object(gathered, mine)
        by_replica: list[list[np.ndarray]] = []
        for index in range(layout.data):
            first, *others = [arrays for owner, arrays in gathered if owner == index]
            for other in others:  # every rank of a replica must return the same
                assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
            by_replica.append(first)
        return by_replica

    initial = weights_of(trainer)
    before = everyone(case.steps[0])
    if case.spoilt:
        with pytest.raises(FloatingPointError):  # on every rank: none is left waiting for another
            trainer.train_step(case.spoilt[replica], case.temperature, case.denominator)
    metrics = [trainer.train_step(packs[replica], case.temperature, case.denominator) for packs in case.steps]
    reference = everyone(case.steps[0], trainer.reference_log_probs) if case.learning.kl_coefficient else []
    after = everyone(case.steps[0])
    final = weights_of(trainer)
    export = folder / f"{case.name}-export"
    trainer.export(export)
    with pytest.raises(ModelError):  # likewise
        trainer.export(export)
    trainer.close()
    return Result(before, metrics, after, initial, final, export, reference)
