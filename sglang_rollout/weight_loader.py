"""The part of a weight sync that runs in SGLang's own processes, one for each rank of the engine.

SGLang calls `execute` as the model's weight loader (its `custom_weight_loader`). Each rank fetches weights by
our transports, checks them, and hands them to SGLang's own checkpoint loading, which shards and fuses them;
or it puts an adapter's matrices aside, which SGLang's own LoRA gets at the end (`served_adapter`).
An exception here would end SGLang's process, so a failure is written to a receipt instead.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sglang_rollout import served_adapter
from sglang_rollout.loader_reads import loader_reads
from treepo.config.trainer import LoraConfig
from treepo.errors import EngineError, TransportError
from treepo.weight_sync.receive import RankReceiver
from treepo.weight_sync.shared_memory import Report, Reports
from treepo.weight_sync.wire import Address, Bucket

LOADER = f"{__name__}.execute"

_receiver = RankReceiver()  # global, because SGLang calls a function


@dataclass(frozen=True, slots=True)
class Join:
    """Connect to each lane's sender, and disconnect from the senders of an earlier update. of_adapter: they
    send an adapter.
    """

    addresses: Sequence[Address]
    of_adapter: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """Receive a round's buckets, one of each lane, and overwrite the weights in them. of_adapter: they have
    those of an adapter, which are put aside.
    """

    buckets: Sequence[Bucket | None]
    of_adapter: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """The update is complete. lora: of the adapter that has arrived and is served from now on."""

    lora: LoraConfig | None = None


Command = Join | Load | End


class Receipts:
    """Shared memory in which each rank reports the outcome of one command. The engine's process owns it."""

    def __init__(self, ranks: int) -> None:
        self._reports = Reports(ranks)

    def message(self, command: Command) -> Tensor:
        """The message that SGLang carries to every rank: uint8 [bytes]."""
        text = pickle.dumps((command, self._reports.box))
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def check(self) -> None:
        """Raise the failure that a rank reported: TransportError or EngineError."""
        for rank, report in enumerate(self._reports.read()):
            if report is None:
                raise EngineError(f"rank {rank}: it did not answer")
            if report.kind != "done":
                error = TransportError if report.kind == "transport" else EngineError
                raise error(f"rank {rank}: {report.text}")

    def close(self) -> None:
        self._reports.close()


def execute(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Execute the one command in `named_tensors` and write a receipt."""
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    ((_, message),) = named_tensors
    command, box = pickle.loads(message.cpu().numpy().tobytes())
    rank = get_tensor_model_parallel_rank()
    try:
        _execute(command, model, rank)
    except TransportError as error:
        outcome = Report("transport", str(error))
    except Exception as error:  # the engine's process raises it again
        outcome = Report("weights", f"{type(error).__name__}: {error}")
    else:
        outcome = Report("done")
    box.write(rank, outcome)


def _execute(command: Command, model: nn.Module, rank: int) -> None:
    match command:
        case Join(addresses, of_adapter):
            served_adapter.forget()
            device = next(model.parameters()).device
            reads = served_adapter.reads if of_adapter else partial(loader_reads, model)
            _receiver.join(addresses, rank, device, reads)
        case Load(buckets, of_adapter):
            load: Any = served_adapter.put_aside if of_adapter else model.load_weights
            _receiver.load(buckets, load)
        case End(lora):
            _receiver.end()
            if lora is not None:
                served_adapter.serve(lora)
