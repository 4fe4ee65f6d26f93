"""The part of a weight sync that runs in SGLang's own processes, one for each tensor-parallel rank.

SGLang calls `execute` as the model's weight loader (its `custom_weight_loader`). Each rank fetches weights by
our transports, checks them, and hands them to SGLang's own checkpoint loading, which shards and fuses them;
or it puts an adapter's matrices aside, which SGLang's own LoRA gets at the end (`served_adapter`).
An exception here would end SGLang's process, so a failure is written to a receipt instead.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglang_rollout import served_adapter
from treepo.config.trainer import LoraConfig
from treepo.errors import EngineError, TransportError
from treepo.weight_sync.shared_memory import Report, Reports
from treepo.weight_sync.wire import Address, Bucket, Receiver, checksums, views

LOADER = f"{__name__}.execute"

_receiver: Receiver | None = None  # global, because SGLang calls a function


@dataclass(frozen=True, slots=True)
class Join:
    """Connect to the sender of an update, and disconnect from the sender of an earlier update."""

    address: Address


@dataclass(frozen=True, slots=True)
class Load:
    """Receive a bucket and overwrite the weights in it. of_adapter: it has those of an adapter, which are put
    aside.
    """

    bucket: Bucket
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
    global _receiver
    match command:
        case Join(address):
            _leave_sender()
            served_adapter.forget()
            device = next(model.parameters()).device
            _receiver = _transferred(lambda: address.join(rank, device))
        case Load(bucket, of_adapter):
            receiver = _receiver
            if receiver is None:
                raise TransportError("a bucket arrived before the rank joined the sender")
            flat = _transferred(lambda: receiver.receive(bucket))
            stripes = receiver.stripes(bucket)
            if checksums(flat, stripes) != bucket.checksums[stripes]:
                raise EngineError(f"a bucket of {bucket.nbytes} bytes arrived with another checksum")
            load: Any = served_adapter.put_aside if of_adapter else model.load_weights
            load(list(views(flat, bucket.tensors)))
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()  # the sender writes the next bucket over this one
        case End(lora):
            if _receiver is not None:
                _receiver.end()
            if lora is not None:
                served_adapter.serve(lora)


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
