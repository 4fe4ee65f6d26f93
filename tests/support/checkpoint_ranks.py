"""The work of one rank in the tests of training checkpoints, for `megatron_ranks.run_lives`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.support.full_disk import full_disk
from tests.support.megatron_ranks import weights_of
from tests.support.random_trees import random_tree
from treepo.config.learning import LearningConfig
from treepo.config.trainer import LoraConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from treepo.errors import TreepoError
from treepo.learning import advantage
from treepo.learning.packing import Pack, pack_trees

VOCABULARY = 127  # odd: padded to another size by every number of tensor-parallel ranks


def some_packs() -> list[Pack]:
    """Packs of four random trees, with old log-probs."""
    rng, learning = np.random.default_rng(5), LearningConfig()
    trees = [random_tree(rng, f"p{i}", vocabulary=VOCABULARY, max_depth=4) for i in range(4)]
    longest = max(len(tree.prompt) + len(tree.response(leaf)) for tree in trees for leaf in tree.leaves)
    (packs,) = pack_trees(trees, advantage.estimate(trees, learning), longest + 10, 1)
    return [replace(pack, old_log_prob=np.full(len(pack), -4.5, np.float32)) for pack in packs]


@dataclass(frozen=True)
class Case:
    """One trainer's life: load, take `steps` optimizer steps on the packs, and save once on the way.

    save_after: the number of steps before the save, which ends after the next step if there is one.
    """

    model: Path
    packs: Sequence[Pack]
    denominator: float
    optimizer: OptimizerConfig
    dtype: str = "float32"
    learning: LearningConfig = field(default_factory=LearningConfig)
    load: Path | None = None
    steps: int = 2
    save: Path | None = None
    save_after: int = 0
    experts: bool = False  # whether the model has experts
    lora: LoraConfig | None = None
    finish: bool = True  # False: the ranks end as if they were killed during the save


@dataclass
class Result:
    """start, final: the weights after loading and at the end, by their Hugging Face names. adapters: at the
    end, by PEFT's names; empty without `lora`.
    """

    start: dict[str, Tensor]
    metrics: list[dict[str, float]]
    reference: list[np.ndarray]
    final: dict[str, Tensor]
    adapters: dict[str, Tensor]


def live(case: Case, layout: ParallelConfig, rank: int, store, folder: Path) -> Result:
    del folder
    trainer = _trainer(case, layout, rank, store)
    packs = case.packs if layout.data == 1 else (case.packs[:1], case.packs[1:])[layout.replica(rank)]
    if case.load is not None:
        trainer.load(case.load)
    start = weights_of(trainer)
    metrics = []
    for step in range(case.steps + 1):
        if case.save is not None and step == case.save_after:
            trainer.save(case.save, {"step": step})
        if step < case.steps:
            metrics.append(trainer.train_step(packs, 1.0, case.denominator))
    if case.finish:
        trainer.finish_save()
    reference = trainer.reference_log_probs(packs, 1.0) if case.learning.kl_coefficient else []
    final = weights_of(trainer)
    adapters = {name: tensor.clone() for name, tensor in trainer.adapters()}
    trainer.close()
    return Result(start, metrics, reference, final, adapters)


def fail(case: Case, layout: ParallelConfig, rank: int, store, folder: Path) -> list[str]:
    """Save on a full disk, first rank 0's, then the last rank's; then save successfully.

    Returns the errors, which must be the same on every rank.
    """
    trainer = _trainer(case, layout, rank, store)
    everything: list[list[str]] = [[]] * layout.ranks
    said = []
    assert case.save is not None
    for full in (0, layout.ranks - 1):
        with full_disk(rank == full):
            said.append(_said(_save, trainer, folder / f"full-{full}"))
    with full_disk(rank == 0):
        said.append(_said(trainer.export, folder / "export"))
    torch.distributed.all_gather_object(everything, said)
    _save(trainer, case.save)
    trainer.export(folder / "export")
    trainer.close()
    assert all(of_rank == said for of_rank in everything), everything
    return said


def refuse(case: Case, layout: ParallelConfig, rank: int, store, folder: Path) -> str:
    """Load a checkpoint that does not fit; return the error."""
    del folder
    trainer = _trainer(case, layout, rank, store)
    said = _said(trainer.load, case.load)
    trainer.close()
    return said


def dense(layout: ParallelConfig) -> ParallelConfig:
    """The layout for a model without experts."""
    return layout.model_copy(update={"expert": 1})


def _save(trainer, folder: Path) -> None:
    trainer.save(folder, {})
    trainer.finish_save()


def _said(work: Callable[..., None], *arguments: object) -> str:
    try:
        work(*arguments)
    except TreepoError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _trainer(case: Case, layout: ParallelConfig, rank: int, store):
    from megatron_bridge.trainer import MegatronTrainer

    for pack in case.packs:
        for column in pack.columns().values():
            column.flags.writeable = False  # as from Ray's object store
    parallel = layout if case.experts else dense(layout)
    config = TrainerConfig(parallel=parallel, optimizer=case.optimizer, lora=case.lora)
    return MegatronTrainer(case.model, case.dtype, config, case.learning, rank, layout.ranks, store)
