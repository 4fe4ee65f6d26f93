"""The readers that are fuzzed, by name. Each is made with a scratch folder of its own, in memory."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fuzz.loop import Reader

Make = Callable[[Path], Reader]
READERS: Mapping[str, tuple[str, str]] = {
    name: (module, name)
    for module, names in {
        "text_readers": ("config", "overrides", "schedulers", "messages", "chat_template"),
        "data_readers": ("json_lines", "parquet"),
        "model_readers": ("model_config", "weights", "tokenizer", "gguf"),
        "run_readers": (
            "trees",
            "viewed_trees",
            "viewed_run",
            "checkpoint",
            "metrics",
            "evaluation",
            "results",
            "metadata",
        ),
        "message_readers": ("rendezvous_head", "rendezvous_node", "server_answer", "grades"),
    }.items()
    for name in names
}

MARK = b"\x1efile:"
"""It begins a file in an input of several."""


@contextmanager
def open_reader(name: str) -> Iterator[Reader]:
    """Make the reader; its module is imported here, because some take seconds."""
    from importlib import import_module

    module, function = READERS[name]
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="treepo-fuzz-", dir=shared if shared.is_dir() else None))
    try:
        make: Make = getattr(import_module(f"benchmarks.fuzz.{module}"), function)
        yield make(folder)
    finally:
        shutil.rmtree(folder)


def joined(files: Mapping[str, bytes]) -> bytes:
    """Several files as one input."""
    return b"".join(MARK + name.encode() + b"\x1f" + content for name, content in files.items())


def write_files(data: bytes, folder: Path, names: tuple[str, ...]) -> None:
    """Write the files of an input into the empty `folder`; names that are not in `names` are left out."""
    for part in data.split(MARK):
        name, _, content = part.partition(b"\x1f")
        text = name.decode("latin-1")
        if text in names:
            (folder / text).write_bytes(content)


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """The folder, without what an earlier input has left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
