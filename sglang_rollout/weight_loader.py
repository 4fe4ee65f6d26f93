"""The part of a weight sync that runs in SGLang's own processes, one for each tensor-parallel rank.

SGLang calls `execute` as the model's weight loader (its `custom_weight_loader`). Each rank fetches weights by
our transports, checks them, and hands them to SGLang's own checkpoint loading, which shards and fuses them.
An exception here would end SGLang's process, so a failure is written to a receipt instead.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treepo.errors import EngineError, TransportError
from treepo.weight_sync.colocated import SharedBytes, map_bytes
from treepo.weight_sync.wire import Address, Bucket, Receiver, checksum, views

LOADER = f"{__name__}.execute"
_RECEIPT_BYTES = 4096  # for each rank: an exception, truncated to fit

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


Command = Join | Load | End


class Receipts:
    """Shared memory in which each rank reports the outcome of one command. The engine's process owns it."""

    def __init__(self, ranks: int) -> None:
        self._shared = SharedBytes(ranks * _RECEIPT_BYTES)
        self._ranks = ranks

    def message(self, command: Command) -> Tensor:
        """The message that SGLang carries to every rank: uint8 [bytes]."""
        text = pickle.dumps((command, self._shared.path, self._ranks))
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def check(self) -> None:
        """Raise the failure that a rank reported: TransportError or EngineError."""
        for rank, receipt in enumerate(self._shared.bytes.view(self._ranks, _RECEIPT_BYTES)):
            length = int(receipt[:4].view(torch.int32))
            kind, message = pickle.loads(receipt[4 : 4 + length].numpy().tobytes()) if length else (None, "")
            if kind is None and length:
                continue
            error = TransportError if kind == "transport" else EngineError
            raise error(f"rank {rank}: {message or 'it did not answer'}")

    def close(self) -> None:
        self._shared.close()


def execute(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Execute the one command in `named_tensors` and write a receipt."""
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    ((_, message),) = named_tensors
    command, path, ranks = pickle.loads(message.cpu().numpy().tobytes())
    rank = get_tensor_model_parallel_rank()
    try:
        _execute(command, model, rank)
    except TransportError as error:
        outcome = ("transport", str(error))
    except Exception as error:  # the engine's process raises it again
        outcome = ("weights", f"{type(error).__name__}: {error}")
    else:
        outcome = (None, "")
    _write_receipt(path, ranks, rank, outcome)


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
            if (found := checksum(flat)) != bucket.checksum:
                raise EngineError(
                    f"a bucket of {bucket.nbytes} bytes has checksum {found}, not {bucket.checksum}"
                )
            load: Any = model.load_weights
            load(list(views(flat, bucket.tensors)))
        case End():
            if _receiver is not None:
                _receiver.end()


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


def _write_receipt(path: str, ranks: int, rank: int, outcome: tuple[str | None, str]) -> None:
    kind, message = outcome
    text = pickle.dumps((kind, message[: _RECEIPT_BYTES // 4]))  # a character has at most 4 bytes
    receipt = map_bytes(path, ranks * _RECEIPT_BYTES).view(ranks, _RECEIPT_BYTES)[rank]
    receipt[4 : 4 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    receipt[:4].view(torch.int32)[0] = len(text)
