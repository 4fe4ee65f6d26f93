"""A train step on one GPU: packed trees by FlexAttention against flat trajectories by flash attention.

    python -m benchmarks.gpu.train_step    # in the repository's root

Needs one GPU with 140 GB (an H200; one with 80 GB takes `--recompute full --layers 4`), Python 3.12, torch
2.11.0 for CUDA 13 with its dependencies, and wheels that need no compiler and hold no CUDA code:

    names="megatron-core transformers tokenizers huggingface-hub safetensors httpx httpcore h11 anyio
        idna certifi numpy regex tqdm packaging pyyaml pydantic pydantic-core annotated-types
        typing-inspection orjson"
    pip download --no-deps -d wheels -c constraints.txt $names    # on a machine with a network
    pip install --no-index --no-deps --find-links wheels $names

The repository is used from its sources; SGLang, Ray and Transformer Engine are not needed. The script writes
random models of Qwen2.5's shapes in bfloat16. The 7B shape gets 6 layers, because each of its 7.6 billion
parameters would take 18 bytes: weight, gradient, master weight and two values of optimizer state.

The trees have one prompt of 256 tokens and 16 leaves of 1536 or 3072 tokens in segments of 512; the segments
double at each level. The same trainer trains the same trajectories packed and flat. Flat packs use torch's
flash attention, causally, each trajectory by itself. Packed and flat steps alternate, after one of each that
compiles. Each shape, leaf length and initial branching gives one JSON line:

flat_over_packed_time: ratio of seconds, the median over repeats.
ideal_ratio: tokens of all trajectories over the tree's, prompts included; share_of_ideal:
    flat_over_packed_time over it.
unique_tokens_per_second, trajectory_tokens_per_second: tokens of the tree, and of all its trajectories, over
    a step's time.
matrix_share: share of the card's dense bfloat16 rate (MATRIX_RATE, by the device's name; null for others). A
    step's operations are those of step_flops.py: packed, each token of the tree once; flat, every token.
peak_gib: the most memory that torch had allocated during a step; static_gib: before it.
profile (with `--profile`): of one more step of each kind under torch's profiler, the kernels, their
    device_seconds, each kernel family's share of these (kernel_profile.py), and busy: device_seconds over the
    step's seconds without a profiler. The device waits for the host during the rest.
log_prob_difference_mean, _max: packed against flat log-probs of the trained tokens, before any step: both
    compute the same.

`--dry-run` runs the same code on a CPU with a tiny shape, and with the CPU's tree attention.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.full_tree import SEGMENT_TOKENS, WIDTH
from benchmarks.gpu.kernel_profile import profile_step
from benchmarks.packed_and_flat import Setting, Work, work
from benchmarks.random_model import SHAPES, write_model
from benchmarks.step_flops import every_token, step_flops, token_keys, unique_tokens
from megatron_bridge import layers
from megatron_bridge.attention import AttentionPlan
from megatron_bridge.rotary import rotate
from megatron_bridge.trainer import MegatronTrainer, create_store
from treepo.config.learning import LearningConfig
from treepo.config.trainer import TrainerConfig
from treepo.learning.packing import Pack

MATRIX_RATE = {  # FLOP/s, dense bfloat16, by NVIDIA's data sheets
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of a run, real or dry."""

    shapes: dict[str, dict[str, int]]
    settings: list[Setting]
    dtype: str
    recompute: Literal["none", "full"]
    repeats: int
    profile: bool


def scale(arguments: argparse.Namespace) -> Scale:
    if arguments.dry_run:
        return Scale(
            shapes={"tiny": SHAPES["tiny"]},
            settings=[Setting(1, 8, 32, 8, 2, 1024)],
            dtype="float32",
            recompute="none",
            repeats=1,
            profile=arguments.profile,
        )
    depth = {"0.5b": SHAPES["0.5b"]["num_hidden_layers"], "7b": arguments.layers}
    return Scale(
        shapes={name: SHAPES[name] | {"num_hidden_layers": depth[name]} for name in arguments.shapes},
        settings=[
            Setting(
                prompts=1,
                prompt_tokens=256,
                leaf_tokens=leaf_tokens,
                segment_tokens=SEGMENT_TOKENS,
                initial_branching=initial_branching,
                max_tokens_per_pack=arguments.max_tokens_per_pack,
            )
            for leaf_tokens in arguments.leaf_tokens
            for initial_branching in arguments.initial_branching
        ],
        dtype="bfloat16",
        recompute=arguments.recompute,
        repeats=arguments.repeats,
        profile=arguments.profile,
    )


@contextmanager
def flash_attention(trajectory_tokens: int) -> Iterator[None]:
    """Within it the trainer attends causally within each trajectory of a flat pack."""

    def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        query, key = rotate(query, plan.cos, plan.sin), rotate(key, plan.cos, plan.sin)
        query, key, value = (
            x.unflatten(0, (-1, trajectory_tokens)).transpose(1, 2) for x in (query, key, value)
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)

    of_trees = layers.attend
    layers.attend = attend
    try:
        yield
    finally:
        layers.attend = of_trees


def measure(shape: str, sizes: dict[str, int], scale: Scale) -> Iterator[dict[str, Any]]:
    """Train a random model of this shape; yield a line for each setting."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), scale.dtype, sizes)
        config = TrainerConfig(recompute=scale.recompute)
        trainer = MegatronTrainer(Path(folder), scale.dtype, config, LearningConfig(), 0, 1, create_store())
    for setting in scale.settings:
        batch = work(setting, sizes["vocab_size"])
        yield {
            "benchmark": "gpu/train_step",
            "device": _device(),
            "shape": shape,
            **compare(trainer, batch, setting, sizes, scale),
            "leaves": WIDTH,
            **asdict(setting),
            "dtype": scale.dtype,
            "recompute": scale.recompute,
            "repeats": scale.repeats,
            "model": sizes,
        }
    trainer.close()


def compare(
    trainer: MegatronTrainer, batch: Work, setting: Setting, sizes: dict[str, int], scale: Scale
) -> dict[str, Any]:
    """The measured part of a line."""
    ways = {"packed": nullcontext, "flat": lambda: flash_attention(setting.trajectory_tokens)}
    steps = {way: partial(trainer.train_step, batch.packs[way], 1.0, batch.denominator) for way in ways}
    log_probs = {}
    for way, attention in ways.items():
        with attention():
            log_probs[way] = by_token(batch.packs[way], trainer.log_probs(batch.packs[way], 1.0))
    off = difference(log_probs["packed"], log_probs["flat"])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, tuple[float | None, float | None]] = {}
    for _ in range(1 + scale.repeats):
        for way, attention in ways.items():
            with attention():
                memory[way], took = _cost(steps[way])
            seconds[way].append(took)
    packed, flat = (seconds[way][1:] for way in ("packed", "flat"))  # the first warmed up
    ratio = statistics.median(slow / fast for fast, slow in zip(packed, flat, strict=True))
    ideal = setting.total_tokens / batch.unique_tokens
    median = {"packed": statistics.median(packed), "flat": statistics.median(flat)}
    counts = {"packed": unique_tokens(batch.packs["packed"]), "flat": every_token(batch.packs["flat"])}
    line: dict[str, Any] = {
        "flat_over_packed_time": ratio,
        "ideal_ratio": ideal,
        "share_of_ideal": ratio / ideal,
        "unique_tokens_per_second": batch.unique_tokens / median["packed"],
        "log_prob_difference_mean": float(off.mean()),
        "log_prob_difference_max": float(off.max()),
    }
    for way, attention in ways.items():
        line[way] = {
            "seconds": median[way],
            "trajectory_tokens_per_second": setting.total_tokens / median[way],
            "matrix_share": _matrix_share(step_flops(sizes, counts[way]) / median[way]),
            "static_gib": memory[way][0],
            "peak_gib": memory[way][1],
            "packs": len(batch.packs[way]),
        }
        if scale.profile:
            with attention():
                profile = profile_step(steps[way])
            line[way]["profile"] = profile | {"busy": profile["device_seconds"] / median[way]}
    return line


def by_token(packs: Sequence[Pack], log_probs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Keys (`token_keys`) and log-probs of the trained tokens."""
    trained = [pack.count_pos + pack.count_neg > 0 for pack in packs]
    keys = [token_keys(pack)[chosen] for pack, chosen in zip(packs, trained, strict=True)]
    values = [log_prob[chosen] for log_prob, chosen in zip(log_probs, trained, strict=True)]
    return np.concatenate(keys), np.concatenate(values)


def difference(packed: tuple[np.ndarray, np.ndarray], flat: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """|flat - packed| of every trained token of the trajectories; a shared token counts once a trajectory."""
    order = packed[0].argsort()
    place = order[np.searchsorted(packed[0], flat[0], sorter=order)]
    assert np.array_equal(packed[0][place], flat[0]), "the two ways train different tokens"
    return np.abs(packed[1][place] - flat[1], dtype=np.float64)


def _cost(step: Callable[[], object]) -> tuple[tuple[float | None, float | None], float]:
    """The memory in GiB before a step and at its peak (None on a CPU), and the step's seconds."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return (None, None), time.perf_counter() - start
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return (before / 2**30, torch.cuda.max_memory_allocated() / 2**30), seconds


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _matrix_share(flops_per_second: float) -> float | None:
    rate = MATRIX_RATE.get(_device())
    return None if rate is None else flops_per_second / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["0.5b", "7b"], default=["0.5b", "7b"])
    parser.add_argument("--layers", type=int, default=6, help="layers of the 7B shape")
    parser.add_argument("--leaf-tokens", type=int, nargs="+", default=[1536, 3072])
    parser.add_argument("--initial-branching", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--max-tokens-per-pack", type=int, default=32768)
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--profile", action="store_true", help="also profile one step of each kind by kernel family"
    )
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on a CPU, in half a minute")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry-run runs on a CPU")
    wanted = scale(arguments)
    for shape, sizes in wanted.shapes.items():
        for line in measure(shape, sizes, wanted):
            print(json.dumps(line), flush=True)  # noqa: T201 - the result


if __name__ == "__main__":
    main()
