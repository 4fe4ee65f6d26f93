"""The part of a weight sync that runs in SGLang's own processes, one for each rank of the engine.

SGLang calls `execute` as the model's weight loader (its `custom_weight_loader`). Each rank fetches weights by
our transports, checks them, and hands them to SGLang's own checkpoint loading, which shards and fuses them;
or it puts an adapter's matrices aside, which SGLang's own LoRA gets at the end (`served_adapter`).
An exception here would end SGLang's process, so a failure is written to a receipt instead.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[reportPrivateImportUsage]  # documented there

from sglang_rollout import served_adapter
from sglang_rollout.loader_reads import loader_reads
from sglang_rollout.rank_store import connect_to_store
from sglang_rollout.receipts import Receipts
from treepo.config.trainer import LoraConfig
from treepo.errors import TransportError
from treepo.weight_sync.receive import RankReceiver
from treepo.weight_sync.shards import everything
from treepo.weight_sync.shared_memory import Report
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


@dataclass(frozen=True, slots=True)
class Answer:
    """Only report: everything that was asked before has been done."""


Command = Join | Load | End | Answer


class _SentBytes:
    """Is a uint8 tensor of these bytes where it is unpickled.

    A tensor's own pickle names a function of torch that Megatron-Core replaces in its process, and SGLang
    unpickles no function of Megatron-Core.
    """

    def __init__(self, sent: bytes) -> None:
        self._sent = sent

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[bytearray]]:
        return partial(torch.frombuffer, dtype=torch.uint8), (bytearray(self._sent),)


def message(command: Command, receipts: Receipts) -> bytes:
    """The message with which SGLang carries a command to a rank, also on another node.

    It holds the bytes themselves, unlike SGLang's own, which name memory of this machine.
    """
    return pickle.dumps([("command", _SentBytes(pickle.dumps((command, receipts))))])


def execute(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Execute the one command in `named_tensors` and write a receipt.

    A pipeline stage passes a command on after it has executed it, and some commands end only if all stages
    take part. Stages therefore execute them in a thread, one after another.
    """
    from sglang.srt.distributed import get_pp_group

    ((_, sent),) = named_tensors
    command, receipts = pickle.loads(sent.cpu().numpy().tobytes())
    if get_pp_group().world_size == 1:
        _report(command, receipts, model)
    else:
        _in_order().put((command, receipts, model))


@cache
def _in_order() -> "Queue[tuple[Command, Receipts, nn.Module]]":
    """Commands that a thread of this process executes in their order."""
    waiting: Queue[tuple[Command, Receipts, nn.Module]] = Queue()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.no_grad():
            while True:
                _report(*waiting.get())

    Thread(target=work, daemon=True).start()
    return waiting


@cache
def _store() -> Store:
    return connect_to_store()


def _report(command: Command, receipts: Receipts, model: nn.Module) -> None:
    rank = torch.distributed.get_rank()
    try:
        _execute(command, model, rank)
    except TransportError as error:
        outcome = Report("transport", str(error))
    except Exception as error:  # the engine's process raises it again
        outcome = Report("weights", f"{type(error).__name__}: {error}")
    else:
        outcome = Report("done")
    receipts.write(_store(), rank, outcome)


def _execute(command: Command, model: nn.Module, rank: int) -> None:
    match command:
        case Join(addresses, of_adapter):
            served_adapter.forget()
            device = next(model.parameters()).device
            # SGLang's LoRA divides an adapter itself.
            reads = everything if of_adapter else partial(loader_reads, model)
            _receiver.join(addresses, rank, device, reads)
        case Load(buckets, of_adapter):
            load: Any = served_adapter.put_aside if of_adapter else model.load_weights
            _receiver.load(buckets, load)
        case End(lora):
            _receiver.end()
            if lora is not None:
                served_adapter.serve(lora)
        case Answer():
            pass
