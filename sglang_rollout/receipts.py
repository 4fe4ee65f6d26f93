"""How the ranks of an engine report the outcome of a command to the process that gave it.

The reports go through the store at which the ranks met, which those of other nodes and other pipeline stages
reach too. SGLang's own answer to a command comes from the first stage alone.
"""

import asyncio
import pickle
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[reportPrivateImportUsage]  # documented there

from treepo.errors import EngineError, TransportError
from treepo.weight_sync.shared_memory import Report

_LOOK_SECONDS = 0.002
_NUMBER = "receipts"  # the store's key of the last command's number


@dataclass(frozen=True, slots=True)
class Receipts:
    """The reports of one command, one from each rank."""

    number: int
    ranks: int

    @classmethod
    def next(cls, store: Store, ranks: int) -> "Receipts":
        return cls(store.add(_NUMBER, 1), ranks)

    def write(self, store: Store, rank: int, report: Report) -> None:
        store.set(self._key(rank), pickle.dumps(report).hex())  # a text, to torch's declared type

    async def check(self, store: Store) -> None:
        """Wait for all reports, and raise the first failure: EngineError if a rank is at fault itself, and
        TransportError if ranks only lost a transfer, because another rank's fault is a lost transfer to them.
        """
        keys = [self._key(rank) for rank in range(self.ranks)]
        while not store.check(keys):
            await asyncio.sleep(_LOOK_SECONDS)
        reports: list[Report] = [pickle.loads(bytes.fromhex(store.get(key).decode())) for key in keys]
        for key in keys:
            store.delete_key(key)
        failures = [(rank, report) for rank, report in enumerate(reports) if report.kind != "done"]
        for rank, report in sorted(failures, key=lambda failure: failure[1].kind == "transport"):
            error = TransportError if report.kind == "transport" else EngineError
            raise error(f"rank {rank}: {report.text}")

    def _key(self, rank: int) -> str:
        return f"receipt-{self.number}-{rank}"
