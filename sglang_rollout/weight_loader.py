"""The part of a weight sync that runs in SGLang's own processes, one for each rank of the engine.

SGLang calls `execute` as the model's weight loader (its `custom_weight_loader`). Each rank fetches weights by
our transports, checks them, and hands them to SGLang's own checkpoint loading, which shards and fuses them.
An exception here would end SGLang's process, so a failure is written to a receipt instead.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[reportPrivateImportUsage]  # documented there

from sglang_rollout.rank_store import connect_to_store
from sglang_rollout.receipts import Receipts
from treepo.errors import EngineError, TransportError
from treepo.weight_sync.shared_memory import Report
from treepo.weight_sync.wire import Address, Bucket, Receiver, checksums, views

LOADER = f"{__name__}.execute"

_receiver: Receiver | None = None  # global, because SGLang calls a function


@dataclass(frozen=True, slots=True)
class Join:
    """Connect to the sender of an update, and disconnect from the sender of an earlier update."""

    address: Address


@dataclass(frozen=True, slots=True)
class Load:
    """Receive a bucket and overwrite the weights in it."""

    bucket: Bucket


@dataclass(frozen=True, slots=True)
class End:
    """The update is complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Only report: everything that was asked before has been done."""


Command = Join | Load | End | Answer


def message(command: Command, receipts: Receipts) -> bytes:
    """The message with which SGLang carries a command to a rank, also on another node.

    It holds the bytes themselves, unlike SGLang's own, which name memory of this machine.
    """
    text = torch.frombuffer(bytearray(pickle.dumps((command, receipts))), dtype=torch.uint8)
    return pickle.dumps([("command", text)])


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
    global _receiver
    match command:
        case Join(address):
            _leave_sender()
            device = next(model.parameters()).device
            _receiver = _transferred(lambda: address.join(rank, device))
        case Load(bucket):
            receiver = _receiver
            if receiver is None:
                raise TransportError("a bucket arrived before the rank joined the sender")
            flat = _transferred(lambda: receiver.receive(bucket))
            stripes = receiver.stripes(bucket)
            if checksums(flat, stripes) != bucket.checksums[stripes]:
                raise EngineError(f"a bucket of {bucket.nbytes} bytes arrived with another checksum")
            load: Any = model.load_weights
            load(list(views(flat, bucket.tensors)))
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()  # the sender writes the next bucket over this one
        case End():
            if _receiver is not None:
                _receiver.end()
        case Answer():
            pass


def _transferred[T](transfer: Callable[[], T]) -> T:
    """Run a transfer; its errors become TransportErrors."""
    try:
        return transfer()
    except (RuntimeError, OSError) as error:
        raise TransportError(str(error)) from error


def _leave_sender() -> None:
    global _receiver
    if _receiver is not None:
        receiver, _receiver = _receiver, None
        receiver.close()
