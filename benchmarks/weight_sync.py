"""Compares weight syncs with a raw copy of the same bytes over the same channel. Prints JSON lines.

    OMP_NUM_THREADS=1 python -m benchmarks.weight_sync --engine

A model of about 250M parameters in bfloat16 goes through each transport to sinks: processes that receive
every bucket and verify its checksum, as an engine's ranks do before they load it. The raw copy sends all
bytes at once, in the same run and processes: `colocated` copies them into shared memory, and every sink
copies them out; `broadcast` is one gloo broadcast; `disk` writes one file, and every sink reads it. Figures
are medians of interleaved repeats. `--engine` adds a real SGLang engine, which loads the weights.

`--delta` compares `disk` with and without `weights.delta` instead: every weight moves a little in float32 and
is rounded to bfloat16 again, as in a step of Adam; then both send the same weights to the same sinks. Each
line is one version, by its distance from the whole one. `--delta-of FOLDER` has the same for the whole
versions that a run with `weights.transport=disk` has kept in a folder: bytes only.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.sink_process import ProcessSink
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.weights import WeightsConfig
from treepo.weight_sync.delta import encode
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import WeightStream, open_sender
from treepo.weight_sync.wire import Address, Bucket, Manifest, Sender, TensorInfo

SECONDS = 300.0
CPU = torch.device("cpu")
DTYPE = "bfloat16"
MODEL: dict[str, Any] = {
    "vocab_size": 65_536,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "eos_token_id": 1,
}


class EngineSink:
    """A real engine, which loads the weights; its coroutines run on a loop of their own."""

    ranks = 1

    def __init__(self, model: Path) -> None:
        self.name = self.key = "engine"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        config = EngineConfig(max_total_tokens=1024, update_seconds=SECONDS)
        self._engine = SGLangEngine(model, DTYPE, config, seed=0)

    def begin(self, version: int, manifest: Manifest) -> None:
        self._call(self._engine.begin(version, manifest)).result()

    def join(self, addresses: Sequence[Address]) -> "Future[None]":
        return self._call(self._engine.join(addresses))

    def load(self, buckets: Sequence[Bucket | None]) -> "Future[None]":
        return self._call(self._engine.load(buckets))

    def commit(self) -> None:
        self._call(self._engine.commit()).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._engine.close)

    def _call(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class Benchmark:
    """Sends one model through a transport, and copies its bytes."""

    def __init__(self, folder: Path, layers: int, bucket_mb: int) -> None:
        torch.manual_seed(0)
        shape: dict[str, Any] = MODEL | {"num_hidden_layers": layers, "tie_word_embeddings": False}
        config = Qwen2Config(**shape)
        model = Qwen2ForCausalLM(config).to(getattr(torch, DTYPE))
        model.save_pretrained(folder / "model")
        self.folder, self.bucket_mb = folder, bucket_mb
        self.tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.manifest = tuple(TensorInfo.of(name, tensor) for name, tensor in self.tensors.items())
        self.whole = torch.cat([tensor.view(torch.uint8).flatten() for tensor in self.tensors.values()])
        self.version = 0

    def compare(self, transport: str, sinks: int, repeats: int) -> dict[str, Any]:
        with ExitStack() as stack:
            receivers = [ProcessSink(f"sink {index}", CPU) for index in range(sinks)]
            for sink in receivers:
                stack.callback(sink.close)
            stream, sender = self._stream(transport), self._sender(transport)
            stack.callback(stream.close)
            stack.callback(sender.close)
            self._update(stream, receivers)  # the first update connects the sinks and touches new memory
            ours, raw = [], []
            for _ in range(repeats):
                ours.append(self._update(stream, receivers))
                raw.append(self._raw(sender, transport, receivers))
                stream.close()  # the raw copy has connected the sinks to the other sender
                self._update(stream, receivers)
        seconds, raw_seconds = statistics.median(ours), statistics.median(raw)
        return {
            "benchmark": "weight_sync",
            "transport": transport,
            "sinks": sinks,
            "over_raw": statistics.median(base / mine for base, mine in zip(raw, ours, strict=True)),
            "bytes": len(self.whole),
            "bytes_per_second": len(self.whole) / seconds,
            "raw_bytes_per_second": len(self.whole) / raw_seconds,
            "bucket_mb": self.bucket_mb,
            "repeats": repeats,
        }

    def deltas(self, sinks: int, steps: int, learning_rate: float) -> Iterator[dict[str, Any]]:
        """The versions after a whole one. A step moves each weight by the learning rate times a normal number
        of deviation 0.23: what Adam's average (0.9) of independent gradients has.
        """
        generator = torch.Generator().manual_seed(1)
        masters = {name: tensor.float() for name, tensor in self.tensors.items()}
        with ExitStack() as stack:
            receivers = [ProcessSink(f"sink {index}", CPU) for index in range(sinks)]
            streams = {}
            for delta in (False, True):
                config = {"transport": "disk", "delta": delta, "keep": 1, "folder": self.folder / str(delta)}
                weights = WeightsConfig.model_validate(config | ({"full_every": 10_000} if delta else {}))
                sender = open_sender(weights, self.folder, "127.0.0.1", SECONDS)
                streams[delta] = WeightStream(sender, self.bucket_mb << 20, SECONDS)
            for one in (*receivers, *streams.values()):
                stack.callback(one.close)
            for stream in streams.values():
                self._update(stream, receivers)
            first = self.whole_bytes()
            for distance in range(1, steps + 1):
                for name, master in masters.items():
                    master += 0.23 * learning_rate * torch.randn(master.shape, generator=generator)
                    self.tensors[name].copy_(master)
                order = list(streams.items())[:: 1 if distance % 2 else -1]
                seconds = {delta: self._update(stream, receivers) for delta, stream in order}
                written = {delta: _written(self.folder / str(delta)) for delta in streams}
                yield {
                    "benchmark": "weight_sync_delta",
                    "sinks": sinks,
                    "learning_rate": learning_rate,
                    "distance": distance,
                    "changed_weights": float((self.whole_bytes() != first).float().mean()),
                    "bytes": written[False],
                    "delta_bytes": written[True],
                    "bytes_ratio": written[False] / written[True],
                    "seconds": seconds[False],
                    "delta_seconds": seconds[True],
                    "bucket_mb": self.bucket_mb,
                }

    def whole_bytes(self) -> torch.Tensor:
        """All weights as 16-bit words."""
        return torch.cat([tensor.flatten().view(torch.int16) for tensor in self.tensors.values()])

    def with_engine(self, transport: str, engine: EngineSink, repeats: int) -> dict[str, Any]:
        stream = self._stream(transport)
        seconds = []
        for _ in range(repeats):
            engine.begin(self.version + 1, self.manifest)
            seconds.append(self._update(stream, [engine]))
            engine.commit()
        stream.close()
        return {
            "benchmark": "weight_sync_engine",
            "transport": transport,
            "bytes": len(self.whole),
            "seconds": statistics.median(seconds),
            "bytes_per_second": len(self.whole) / statistics.median(seconds),
            "bucket_mb": self.bucket_mb,
            "repeats": repeats,
        }

    def _update(self, stream: WeightStream, sinks: Sequence[Any]) -> float:
        self.version += 1
        start = time.perf_counter()
        outcome = stream.send(LocalSource(self.tensors.items(), self.manifest), self.version, sinks)
        elapsed = time.perf_counter() - start
        assert not outcome.failed, outcome
        assert outcome.broken is None, outcome
        return elapsed

    def _raw(self, sender: Sender, transport: str, sinks: Sequence[ProcessSink]) -> float:
        """Seconds to send all bytes at once. With shared memory, filling the buffer is the transfer."""
        joining = [
            sink.order("join raw", address)
            for sink, address in zip(sinks, sender.addresses([1] * len(sinks)), strict=True)
        ]
        infos = (TensorInfo("all", "uint8", (len(self.whole),)),)
        sender.connect(infos)
        for joined in joining:
            joined.result()
        flat = sender.buffer(0, len(self.whole)).fill_(0)
        start = time.perf_counter()
        if transport == "colocated":
            flat.copy_(self.whole)
        bucket = Bucket(infos, (), sender.start(0, flat, infos))
        copying = [sink.order("copy raw", bucket) for sink in sinks]
        sender.finish()
        for copied in copying:
            copied.result()
        elapsed = time.perf_counter() - start
        sender.close()
        return elapsed

    def _sender(self, transport: str) -> Sender:
        config = WeightsConfig.model_validate({"transport": transport})
        return open_sender(config, self.folder, "127.0.0.1", SECONDS)

    def _stream(self, transport: str) -> WeightStream:
        return WeightStream(self._sender(transport), self.bucket_mb << 20, SECONDS)


def _written(folder: Path) -> int:
    """Bytes of the newest version."""
    newest = max(folder.glob("version-*"), key=lambda path: int(path.name.split("-")[1]))
    return sum(path.stat().st_size for path in newest.iterdir())


def deltas_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Consecutive whole versions in a folder: how each differs from the one before, and from the first."""
    numbers = sorted(int(path.name.split("-")[1]) for path in folder.glob("version-*"))
    versions = [_words_of(folder / f"version-{number}") for number in numbers]
    for before, (first, new) in enumerate(zip([versions[0]] * len(versions), versions[1:], strict=False)):
        line: dict[str, Any] = {"benchmark": "deltas_of", "version": numbers[before + 1], "bytes": new.nbytes}
        for name, old in (("step", versions[before]), ("first", first)):
            line[f"changed_since_{name}"] = float((old != new).mean())
            line[f"delta_bytes_since_{name}"] = len(encode(old.view(np.uint8), new.view(np.uint8)))
        yield line


def _words_of(folder: Path) -> np.ndarray:
    """All bfloat16 weights of a whole version, as 16-bit words."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = [tensor for file in files for _, tensor in sorted(load_file(file).items())]
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return torch.cat([tensor.flatten().view(torch.int16) for tensor in tensors]).numpy().view(np.uint16)


def show(record: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sinks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--transports", nargs="+", default=["colocated", "broadcast", "disk"])
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="layers of the model")
    parser.add_argument("--engine", action="store_true", help="measure a real engine too")
    parser.add_argument("--delta", type=int, metavar="STEPS", help="compare disk with and without delta")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="with --delta")
    parser.add_argument("--delta-of", type=Path, metavar="FOLDER", help="of a run: weights/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.delta_of:
        for line in deltas_of(arguments.delta_of):
            show(line)
        return
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), arguments.layers, arguments.bucket_mb)
        if arguments.delta:
            for sinks in arguments.sinks:
                for line in benchmark.deltas(sinks, arguments.delta, arguments.learning_rate):
                    show(line)
            return
        for transport in arguments.transports:
            for sinks in arguments.sinks:
                show(benchmark.compare(transport, sinks, arguments.repeats))
        if arguments.engine:
            engine = EngineSink(Path(folder) / "model")
            for transport in arguments.transports:
                show(benchmark.with_engine(transport, engine, arguments.repeats))
            engine.close()


if __name__ == "__main__":
    main()
