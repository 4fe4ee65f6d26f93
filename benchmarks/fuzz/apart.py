"""Fuzzes a reader in a process of its own, because an input may end it."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.fuzz.loop import Result, current, fuzz
from benchmarks.fuzz.readers import open_reader

_RESTARTS = 20  # after inputs that end the process


def fuzz_apart(name: str, inputs: int, seed: int, out: Path) -> Result:
    """Fuzz in a process of its own, again with another seed after an input that ends it."""
    total, failures = Result(), {}
    context = multiprocessing.get_context("spawn")
    for restart in range(_RESTARTS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, inputs, seed + 1000 * restart, out, sender))
        process.start()
        sender.close()
        try:
            total = receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode == 1:
                raise RuntimeError(f"{name}: the reader could not be made") from None
            path = out / f"{name}-exit{process.exitcode}-{restart}"
            path.write_bytes(current(out / f"{name}.current"))
            failures[f"! the process ended with {process.exitcode} ({restart})"] = str(path)
        else:
            break
    (out / f"{name}.current").unlink(missing_ok=True)
    total.failures |= failures
    return total


def _child(name: str, inputs: int, seed: int, out: Path, sender: Connection) -> None:
    with open_reader(name) as reader:
        sender.send(fuzz(reader, max(int(inputs * reader.share), 1), seed, out))
