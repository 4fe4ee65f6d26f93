"""SGLang's arguments: what the configuration and the device decide, then what the user adds.

`engine.sglang` may set any argument of SGLang 0.5.16's `ServerArgs`, unless another key sets it or the
project depends on its value.
"""

import difflib
import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from sglang_rollout.rank_store import Meeting
from sglang_rollout.routes import experts_of
from sglang_rollout.served_adapter import sglang_lora
from sglang_rollout.weight_loader import LOADER
from treepo.config.engine import EngineConfig
from treepo.config.trainer import LoraConfig
from treepo.errors import ConfigError, EngineError

_CPU_EXPERT_ROWS = 32
CPU_KV_TOKENS = 1 << 17  # on a CPU: SGLang's default takes most of the memory, which others need too
GRAPH_MIB = 2
"""SGLang's own estimate of the memory of decoding as a CUDA graph, for each request of the largest batch."""
_MOST_IN_GRAPH = 512  # SGLang's largest choice; in larger batches the GPU works longer than the CPU launches
_GRAPH_SHARE = 64  # graphs take at most this part of the device

# The device's memory can be offloaded and reloaded. The weights are kept in the host's memory meanwhile, so
# that an engine that misses an update still has the weights of a version.
_SHARES_DEVICE = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}

_DETERMINISTIC_WITH_CACHE = ("fa3", "fa4", "triton")
_OWN_KEYS = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "random_seed": "seed",
    "tp_size": "engine.tensor",
    "pp_size": "engine.pipeline",
    "ep_size": "engine.expert",
    "nnodes": "engine.nodes",
    "dp_size": "engine.count",
    "max_total_tokens": "engine.max_total_tokens",
    "mem_fraction_static": "engine.memory_fraction",
    "attention_backend": "engine.attention_backend",
    "log_level": "engine.log_level",
    "enable_memory_saver": "placement",
    "enable_weights_cpu_backup": "placement",
    "enable_return_routed_experts": "trainer.routing_replay",
    "enable_lora": "weights.send",
    "max_lora_rank": "trainer.lora.rank",
    "lora_target_modules": "trainer.lora.targets",
}
_FIXED = {
    "device": "an engine runs on the GPUs that it is given, or on the CPU",
    "base_gpu_id": "an engine runs on the GPUs that it is given",
    "gpu_id_step": "an engine runs on the GPUs that it is given",
    "node_rank": "the placement of the ranks decides it",
    "dist_init_addr": "the ranks meet at a port that is taken from the start",
    "nccl_port": "the ranks meet at a port that is taken from the start",
    "trust_remote_code": "code of a model folder never runs",
    "json_model_override_args": "engines and trainer read the same config.json",
    "skip_tokenizer_init": "an engine takes and returns tokens",
    "tokenizer_path": "an engine takes and returns tokens",
    "disable_radix_cache": "trees share their prefixes in it",
    "quantization": "weight syncs send weights of model.dtype",
    "lora_paths": "the adapter comes from the trainer",
    "max_loras_per_batch": "an engine serves one adapter",
    "enable_lora_overlap_loading": "an adapter is loaded while no request runs",
    "custom_weight_loader": "weight syncs need their own",
    "weight_version": "weight syncs set it",
    "custom_sigquit_handler": "engines are supervised by their pool",
}


def sglang_arguments(
    model: Path,
    dtype: str,
    config: EngineConfig,
    seed: int,
    *,
    shares_device: bool = False,
    paths_at_once: int | None = None,
    routes: bool = False,
    lora: LoraConfig | None = None,
    meeting: Meeting | None = None,
) -> dict[str, Any]:
    """The arguments of one engine, or of its processes on one node; everything else is SGLang's default.

    shares_device: whether other work needs the device's memory at times. paths_at_once: the most paths that
    the engine samples at once; None if unknown. routes: whether it returns routes. lora: of the adapter that
    it serves; None if it serves weights alone. meeting: of the processes, for an engine on several nodes.
    """
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "dtype": dtype,
        "random_seed": seed,
        "tp_size": config.tensor,
        "pp_size": config.pipeline,
        "ep_size": config.expert,
        "trust_remote_code": False,
        # SGLang 0.5.16 imports the folder's code for an architecture that it does not know, trusted or not.
        "json_model_override_args": '{"auto_map": {}}',
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "max_total_tokens": config.max_total_tokens,
        "mem_fraction_static": config.memory_fraction,
        "attention_backend": config.attention_backend,
        "weight_version": "0",
        "custom_weight_loader": [LOADER],
        "log_level": config.log_level,
    }
    if config.pipeline > 1:
        arguments["disable_overlap_schedule"] = True  # SGLang's stages overlap with each other instead
    if meeting is not None and config.nodes is not None and config.nodes > 1:
        nodes = {"nnodes": config.nodes, "node_rank": meeting.share, "dist_init_addr": meeting.address}
        arguments |= nodes
    if routes:
        arguments["enable_return_routed_experts"] = True
    if lora is not None:
        arguments |= sglang_lora(lora)
    if threading.current_thread() is threading.main_thread():
        arguments["custom_sigquit_handler"] = _child_failed
    if shares_device:
        arguments |= _SHARES_DEVICE
        if os.environ.get("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "").lower() in ("1", "true"):
            arguments["disable_prefill_cuda_graph"] = True  # the saver cannot release prefill graphs
    if torch.cuda.is_available():
        arguments |= _of_gpu(model, paths_at_once)
    else:
        arguments |= _of_cpu(model, config)
    return arguments | config.sglang


def _of_gpu(model: Path, paths_at_once: int | None) -> dict[str, Any]:
    from sglang.srt.utils import get_nvgpu_memory_capacity

    # By nvidia-smi: torch would open a context, which takes GPU memory, in a process that computes nothing.
    memory = get_nvgpu_memory_capacity() * 2**20
    arguments: dict[str, Any] = {"cuda_graph_max_bs_decode": decode_graph_size(paths_at_once, memory)}
    if experts_of(json.loads((model / "config.json").read_text())) > 1:
        # SGLang's own choice on Blackwell permutes the experts' weights after loading them, and an update
        # would be written over the permuted ones. Triton's kernels take them as they are.
        arguments["moe_runner_backend"] = "triton"
    return arguments


def _of_cpu(model: Path, config: EngineConfig) -> dict[str, Any]:
    if config.tensor > 1:
        _check_expert_rows(model, config.tensor)
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,  # there is no device to overlap with
        "sleep_on_idle": True,  # the trainer computes on the same cores
        "lora_backend": "torch_native",
        "max_total_tokens": config.max_total_tokens or CPU_KV_TOKENS,
    }


def _check_expert_rows(model: Path, tensor: int) -> None:
    """Raise EngineError for a mixture that SGLang cannot load: on a CPU it enlarges the experts to a multiple
    of 32 rows a rank, and finds them too small in the folder.
    """
    config = json.loads((model / "config.json").read_text())
    rows, multiple = config.get("moe_intermediate_size"), _CPU_EXPERT_ROWS * tensor
    if experts_of(config) > 1 and isinstance(rows, int) and rows % multiple:
        raise EngineError(
            f"engine.tensor = {tensor} on a CPU: {model} has moe_intermediate_size = {rows}; SGLang serves "
            f"multiples of {_CPU_EXPERT_ROWS} x {tensor} = {multiple}"
        )


def _child_failed(signum: int, frame: object) -> None:
    """A failing child sends SIGQUIT before it ends; `SGLangProcesses.death` reports its end."""


def decode_graph_size(paths_at_once: int | None, memory: float) -> int:
    """The largest batch that decodes as a CUDA graph; a larger one launches each kernel from the CPU.

    It holds all paths that are sampled at once, but at most 512, and as many as 1/64 of the device's `memory`
    (bytes) holds graphs of.
    """
    most = min(_MOST_IN_GRAPH, int(memory / _GRAPH_SHARE) // (GRAPH_MIB << 20))
    return max(most if paths_at_once is None else min(paths_at_once, most), 1)


def check_sglang_arguments(engine: EngineConfig) -> None:
    """Raise ConfigError with a line for each argument in `engine.sglang` that SGLang lacks, that has another
    type or choice there, or that is set elsewhere; and for an `engine.attention_backend` that it lacks.
    """
    if engine.sglang or engine.attention_backend:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kernels for absent devices
            from sglang.srt.server_args import ServerArgs  # takes seconds

        if faults := list(argument_faults(engine, get_type_hints(ServerArgs, include_extras=True))):
            raise ConfigError("\n".join(faults))


def argument_faults(engine: EngineConfig, types: Mapping[str, Any]) -> Iterator[str]:
    """types: the annotated type of each argument; an annotation may have `choices`."""
    yield from _value_faults("engine.attention_backend", engine.attention_backend, types["attention_backend"])
    for name, value in engine.sglang.items():
        key = f"engine.sglang.{name}"
        if name in _OWN_KEYS:
            yield f"{key}: set by {_OWN_KEYS[name]}"
        elif name in _FIXED:
            yield f"{key}: cannot be set, because {_FIXED[name]}"
        elif name not in types:
            near = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{key}: SGLang has no such argument{hint}"
        else:
            yield from _value_faults(key, value, types[name])
    deterministic = engine.sglang.get("enable_deterministic_inference")
    if deterministic is True and engine.attention_backend not in _DETERMINISTIC_WITH_CACHE:
        yield (
            "engine.sglang.enable_deterministic_inference: needs engine.attention_backend = "
            f"{', '.join(_DETERMINISTIC_WITH_CACHE)}; with others SGLang turns the prefix cache off, in "
            "which trees share their prefixes"
        )


def _value_faults(key: str, value: Any, annotated: Any) -> Iterator[str]:
    plain, *notes = get_args(annotated) if hasattr(annotated, "__metadata__") else (annotated,)
    try:
        TypeAdapter(plain).validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"].replace("Input should be", "should be")
        yield f"{key}: {message}, found {value!r}"
        return
    choices = next((note.choices for note in notes if getattr(note, "choices", None)), None)
    if choices and value is not None and value not in choices:
        yield f"{key}: should be one of {', '.join(map(str, choices))}, found {value!r}"
