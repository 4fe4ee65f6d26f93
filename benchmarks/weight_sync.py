"""Compares weight syncs with a raw copy of the same bytes over the same channel. Prints JSON lines.

    OMP_NUM_THREADS=1 python -m benchmarks.weight_sync --engine

A model of about 250M parameters in bfloat16 goes through each transport to sinks: processes that receive
every bucket and verify its checksum, as an engine's ranks do before they load it. The raw copy sends all
bytes at once, in the same run and processes: `colocated` copies them into shared memory, and every sink
copies them out; `broadcast` is one gloo broadcast; `disk` writes one file, and every sink reads it. Figures
are medians of interleaved repeats. `--engine` adds a real SGLang engine, which loads the weights.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.sink_process import ProcessSink
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.weights import WeightsConfig
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), arguments.layers, arguments.bucket_mb)
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
