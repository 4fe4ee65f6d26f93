"""SGLang's arguments: those of the configuration and the device, and the checks of `engine.sglang`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import sglang.srt.utils
import torch

from sglang_rollout.arguments import (
    argument_faults,
    check_sglang_arguments,
    decode_graph_size,
    sglang_arguments,
)
from sglang_rollout.rank_store import Meeting
from treepo.config.engine import EngineConfig
from treepo.errors import ConfigError, EngineError

GIB = 1 << 30


@dataclass(frozen=True)
class Choices:
    """As SGLang's own annotation."""

    choices: list[str]


TYPES: dict[str, Any] = {
    "attention_backend": Annotated[str | None, Choices(["triton", "fa3"])],
    "kv_cache_dtype": Annotated[str, Choices(["auto", "fp8_e5m2"])],
    "page_size": Annotated[int | None, "Tokens of a page."],
    "schedule_conservativeness": Annotated[float, "A number."],
    "cuda_graph_bs_decode": Annotated[list[int] | None, "Sizes."],
    "enable_deterministic_inference": Annotated[bool, "Whether."],
    "deepep_mode": Literal["auto", "normal"],
}


def engine(**sglang: Any) -> EngineConfig:
    return EngineConfig.model_validate({"sglang": sglang})


def on_gpu(monkeypatch: pytest.MonkeyPatch, memory: int = 80 * GIB) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sglang.srt.utils, "get_nvgpu_memory_capacity", lambda: memory / 2**20)


def arguments(folder: Path, config: EngineConfig, model: dict[str, Any], **settings: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(model))
    return sglang_arguments(folder, "bfloat16", config, 7, **settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_cache_dtype": "fp8_e5m2", "page_size": None, "deepep_mode": "normal"}, None),
        ({"schedule_conservativeness": 1, "cuda_graph_bs_decode": [1, 2]}, None),
        (
            {"kv-cache-dtype": "auto"},
            "kv-cache-dtype: SGLang has no such argument; did you mean 'kv_cache_dtype'?",
        ),
        ({"zzz": 1}, "zzz: SGLang has no such argument"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype: should be one of auto, fp8_e5m2, found 'fp9'"),
        ({"page_size": "8"}, "page_size: should be a valid integer, found '8'"),
        ({"cuda_graph_bs_decode": 8}, "cuda_graph_bs_decode: should be a valid list, found 8"),
        ({"enable_deterministic_inference": 1}, "should be a valid boolean, found 1"),
        ({"deepep_mode": "fast"}, "deepep_mode: should be 'auto' or 'normal', found 'fast'"),
        ({"tp_size": 2}, "engine.sglang.tp_size: set by engine.tensor"),
        ({"pp_size": 2}, "engine.sglang.pp_size: set by engine.pipeline"),
        ({"ep_size": 2}, "engine.sglang.ep_size: set by engine.expert"),
        ({"nnodes": 2}, "engine.sglang.nnodes: set by engine.nodes"),
        ({"node_rank": 1}, "cannot be set, because the placement of the ranks decides it"),
        ({"attention_backend": "fa3"}, "set by engine.attention_backend"),
        ({"disable_radix_cache": True}, "cannot be set, because trees share their prefixes in it"),
    ],
)
def test_an_argument_is_sglangs_and_not_set_elsewhere(given: dict[str, Any], said: str | None) -> None:
    faults = list(argument_faults(engine(**given), TYPES))
    if said is None:
        assert faults == []
    else:
        (fault,) = faults
        assert fault.startswith("engine.sglang.")
        assert said in fault


def test_every_fault_has_a_line() -> None:
    config = EngineConfig.model_validate({"attention_backend": "fa9", "sglang": {"tp_size": 2, "zzz": 1}})
    assert len(list(argument_faults(config, TYPES))) == 3


@pytest.mark.parametrize(
    ("backend", "good"), [(None, False), ("flashinfer", False), ("fa3", True), ("triton", True)]
)
def test_deterministic_inference_keeps_the_prefix_cache(backend: str | None, good: bool) -> None:
    types = TYPES | {"attention_backend": str | None}
    for deterministic in (True, False):
        config = EngineConfig.model_validate(
            {
                "attention_backend": backend,
                "sglang": {"enable_deterministic_inference": deterministic},
            }
        )
        assert bool(list(argument_faults(config, types))) == (deterministic and not good)


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_is_told_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    """The keys of an engine on several nodes, as SGLang names them."""
    on_gpu(monkeypatch)
    config = EngineConfig(tensor=16, pipeline=2, expert=8, nodes=4)
    given = arguments(tmp_path, config, {}, meeting=Meeting("fd00::1", 4000, share))
    expected = {"tp_size": 16, "pp_size": 2, "ep_size": 8, "nnodes": 4, "node_rank": share}
    assert given.items() >= expected.items()
    assert given["dist_init_addr"] == "[fd00::1]:4000"
    assert given["disable_overlap_schedule"] is True


def test_an_engine_on_one_node_is_told_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch)
    given = arguments(tmp_path, EngineConfig(tensor=4), {})
    assert not given.keys() & {"nnodes", "node_rank", "dist_init_addr", "disable_overlap_schedule"}


def test_a_mixture_that_sglang_cannot_load_on_a_cpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    experts = {"num_experts": 4, "moe_intermediate_size": 96}
    arguments(tmp_path, EngineConfig(tensor=3), experts)
    arguments(tmp_path, EngineConfig(tensor=2), {"moe_intermediate_size": 96})
    with pytest.raises(EngineError, match=r"moe_intermediate_size = 96; SGLang serves multiples of 32 x 2"):
        arguments(tmp_path, EngineConfig(tensor=2), experts)


def test_without_arguments_sglang_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sglang.srt.server_args", None)
    check_sglang_arguments(EngineConfig())
    with pytest.raises(ImportError):
        check_sglang_arguments(engine(page_size=1))


def test_the_users_arguments_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    config = engine(kv_cache_dtype="fp8_e5m2", cuda_graph_max_bs_decode=64)
    given = arguments(tmp_path, config, {}, paths_at_once=1000)
    assert given["kv_cache_dtype"] == "fp8_e5m2"
    assert given["cuda_graph_max_bs_decode"] == 64
    assert (given["dtype"], given["random_seed"]) == ("bfloat16", 7)


@pytest.mark.parametrize(
    ("model", "runner"),
    [
        ({"num_hidden_layers": 2}, None),
        ({"num_experts": 128}, "triton"),  # Qwen3-MoE
        ({"num_local_experts": 8}, "triton"),  # Mixtral
        ({"n_routed_experts": 64}, "triton"),  # DeepSeek
        ({"num_experts": None}, None),
    ],
)
def test_experts_are_kept_as_updates_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], runner: str | None
) -> None:
    on_gpu(monkeypatch)
    assert arguments(tmp_path, EngineConfig(), model).get("moe_runner_backend") == runner


def test_a_cpu_has_neither_graphs_nor_other_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = arguments(tmp_path, EngineConfig(), {"num_experts": 8}, paths_at_once=8)
    assert (given["device"], given["attention_backend"]) == ("cpu", "torch_native")
    assert not {"moe_runner_backend", "cuda_graph_max_bs_decode"} & set(given)


@pytest.mark.parametrize(("variable", "disabled"), [("1", True), ("true", True), ("0", False), (None, False)])
def test_graphs_that_the_saver_cannot_release_are_not_made_with_its_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, disabled: bool
) -> None:
    on_gpu(monkeypatch)
    monkeypatch.delenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", raising=False)
    if variable is not None:
        monkeypatch.setenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", variable)
    shared = arguments(tmp_path, EngineConfig(), {}, shares_device=True)
    assert shared["enable_memory_saver"]
    assert shared.get("disable_prefill_cuda_graph", False) == disabled
    assert "disable_prefill_cuda_graph" not in arguments(tmp_path, EngineConfig(), {})


@pytest.mark.parametrize(
    ("paths", "memory", "size"),
    [
        (128, 80 * GIB, 128),  # what is sampled at once
        (4096, 80 * GIB, 512),
        (None, 80 * GIB, 512),  # unknown
        (4096, 40 * GIB, 320),  # a 64th of the device at 2 MiB each
        (4096, 24 * GIB, 192),
        (0, 24 * GIB, 1),
    ],
)
def test_graphs_are_as_large_as_the_paths_at_once_and_the_memory_allow(
    paths: int | None, memory: int, size: int
) -> None:
    assert decode_graph_size(paths, memory) == size


@pytest.mark.slow
def test_sglangs_own_arguments_are_checked() -> None:
    from typing import get_type_hints

    from sglang.srt.server_args import ServerArgs

    from sglang_rollout.arguments import _FIXED, _OWN_KEYS

    types = get_type_hints(ServerArgs, include_extras=True)
    assert set(_OWN_KEYS) | set(_FIXED) <= set(types)
    for name in types:
        list(argument_faults(engine(**{name: None}), types))  # every type can be checked
    check_sglang_arguments(engine(kv_cache_dtype="fp8_e5m2", page_size=16))
    with pytest.raises(ConfigError, match="did you mean 'cuda_graph_max_bs_decode'"):
        check_sglang_arguments(engine(cuda_graph_max_bs=8))
    with pytest.raises(ConfigError, match=r"engine\.attention_backend: should be one of triton"):
        check_sglang_arguments(EngineConfig(attention_backend="fa9"))
