"""Real Megatron-Core ranks that send their weights to fake engines in all lanes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.megatron_ranks import sent_in_lanes
from tests.support.weight_sinks import CPU, FakeSink, reasons
from treepo.config.learning import LearningConfig
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.errors import EngineError
from treepo.weight_sync.broadcast import BroadcastSender
from treepo.weight_sync.lanes import MOST_LANES
from treepo.weight_sync.send import Outcome, WeightStream

BUCKET = 8192
SECONDS = 20.0
ENGINES = (1, 2)  # their ranks


@dataclass(frozen=True)
class LaneCase:
    """failing: the round in which the second engine refuses; None if it does not."""

    model: Path
    layout: ParallelConfig
    failing: int | None = None


def send_in_lanes(case: LaneCase, _: ParallelConfig, rank: int, store, folder: Path) -> list[str]:
    """Send to two engines from every lane; return all ranks' faults."""
    from megatron_bridge.trainer import MegatronTrainer

    del folder
    config = TrainerConfig(parallel=case.layout)
    trainer = MegatronTrainer(
        case.model, "bfloat16", config, LearningConfig(), rank, case.layout.ranks, store
    )
    expected = dict(trainer.tensors())
    engines: list[Any] = [_Described(f"engine {index}", ranks) for index, ranks in enumerate(ENGINES)]
    if rank == 0:
        engines = [FakeSink(engine.name, engine.ranks) for engine in engines]
    stream = WeightStream(BroadcastSender(CPU, "127.0.0.1", SECONDS), BUCKET, SECONDS)
    faults = _sent(trainer, stream, engines, case.failing)
    if rank == 0:
        taking = engines if case.failing is None else engines[:1]
        faults += [fault for engine in taking for fault in _differences(engine, expected)]
        for engine in engines:
            engine.close()
    two = sorted(name for name, _ in sent_in_lanes(trainer, 2))
    if rank == 0 and two != sorted(expected):
        faults.append("two lanes do not send every tensor once")
    stream.close()
    everyone = [faults] * case.layout.ranks
    torch.distributed.all_gather_object(everyone, faults)
    trainer.close()
    return [fault for each in everyone for fault in each]


def _sent(trainer, stream: WeightStream, engines: list[Any], failing: int | None) -> list[str]:
    """Send; if the second engine refuses, send to the first alone. What went otherwise."""
    source, faults = trainer.weight_source(MOST_LANES), []

    def refuse(at: str | int) -> None:
        if at == failing:
            raise EngineError("no")

    engines[1].fault = refuse
    if failing is not None:
        outcome = stream.send(source, 1, engines)
        if source.lane == 0:
            if reasons(outcome) != {"engine 1": "no"} or not outcome.broken:
                faults.append(f"not left out: {outcome}")
            engines[0].forget()
        engines = engines[:1]
    outcome = stream.send(source, 1, engines)
    if outcome != Outcome():
        faults.append(f"lane {source.lane}: {outcome}")
    return faults


def _differences(engine: FakeSink, expected: dict[str, Tensor]) -> list[str]:
    faults = []
    for received in engine.received:
        if received.keys() != expected.keys():
            faults.append(f"{engine.name} has {len(received)} tensors of {len(expected)}")
        faults += [
            f"{engine.name}: {name}" for name, tensor in received.items() if not tensor.equal(expected[name])
        ]
    return faults


@dataclass
class _Described:
    """An engine as ranks other than 0 know it."""

    name: str
    ranks: int
    key: str = ""
    fault: object = None
