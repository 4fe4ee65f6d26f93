"""The half of a weight update that runs in SGLang's own processes, one for each tensor-parallel rank.

SGLang calls `obey` as the model's weight loader (its `custom_weight_loader`), so the ranks fetch weights by
our transports, check them, and hand them to SGLang's own loading of checkpoints, which shards and fuses them.
An exception here would end SGLang's process: what fails is written to a receipt instead.
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

LOADER = f"{__name__}.obey"
_RECEIPT_BYTES = 4096  # of each rank: an exception, cut to fit

_receiver: Receiver | None = None  # of this process: SGLang's hook gives no other place to keep it


@dataclass(frozen=True, slots=True)
class Join:
    """Meet the sender; an earlier one is left."""

    address: Address


@dataclass(frozen=True, slots=True)
class Load:
    bucket: Bucket


@dataclass(frozen=True, slots=True)
class End:
    """The update is complete."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Leave the sender."""


Action = Join | Load | End | Leave


class Receipts:
    """Where the ranks write what became of an order; the engine's process owns it."""

    def __init__(self, ranks: int) -> None:
        self._shared = SharedBytes(ranks * _RECEIPT_BYTES)
        self._ranks = ranks

    def order(self, action: Action) -> Tensor:
        """What SGLang is to carry to every rank: uint8 [bytes]."""
        text = pickle.dumps((action, self._shared.path, self._ranks))
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def check(self) -> None:
        """Raises what a rank failed with: TransportError or EngineError."""
        for rank, receipt in enumerate(self._shared.bytes.view(self._ranks, _RECEIPT_BYTES)):
            length = int(receipt[:4].view(torch.int32))
            kind, message = pickle.loads(receipt[4 : 4 + length].numpy().tobytes()) if length else (None, "")
            if kind is None and length:
                continue
            error = TransportError if kind == "transport" else EngineError
            raise error(f"rank {rank}: {message or 'it did not answer'}")

    def close(self) -> None:
        self._shared.close()


def obey(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Do what the one order in `named_tensors` says, and write a receipt."""
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    ((_, order),) = named_tensors
    action, path, ranks = pickle.loads(order.cpu().numpy().tobytes())
    rank = get_tensor_model_parallel_rank()
    try:
        _act(action, model, rank)
    except TransportError as error:
        outcome = ("transport", str(error))
    except Exception as error:
        outcome = ("weights", f"{type(error).__name__}: {error}")
    else:
        outcome = (None, "")
    _write_receipt(path, ranks, rank, outcome)


def _act(action: Action, model: nn.Module, rank: int) -> None:
    global _receiver
    match action:
        case Join(address):
            _leave()
            device = next(model.parameters()).device
            _receiver = _moved(lambda: address.join(rank, device))
        case Load(bucket):
            receiver = _receiver
            if receiver is None:
                raise TransportError("a bucket came before the sender was met")
            flat = _moved(lambda: receiver.receive(bucket))
            if (found := checksum(flat)) != bucket.checksum:
                raise EngineError(
                    f"a bucket of {bucket.nbytes} bytes has checksum {found}, not {bucket.checksum}"
                )
            load: Any = model.load_weights
            load(list(views(flat, bucket.tensors)))
        case End():
            if _receiver is not None:
                _receiver.end()
        case Leave():
            _leave()


def _moved[T](transfer: Callable[[], T]) -> T:
    """What a transport raises is a TransportError."""
    try:
        return transfer()
    except (RuntimeError, OSError) as error:
        raise TransportError(str(error)) from error


def _leave() -> None:
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
