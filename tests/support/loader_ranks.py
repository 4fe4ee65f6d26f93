"""Ranks of SGLang models without an engine: what their loaders read, against what they load."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treepo.config.engine import EngineConfig
from treepo.weight_sync.shards import pieces, read_bytes, views
from treepo.weight_sync.wire import Manifest, TensorInfo

DEADLINE = 600.0  # seconds for all models of a number of ranks


def loader_faults(models: Sequence[tuple[Path, dict[str, Tensor], dict[str, Any]]], ranks: int) -> list[Any]:
    """Each rank's answer: for each model, its faults and the share of the bytes that it reads.

    models: a folder, weights by their names, and SGLang's arguments.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, Path(meeting), models, answers))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            received = []
            for _ in processes:
                received.append(answers.get(timeout=DEADLINE))
                assert not isinstance(received[-1], str), received[-1]  # the others may wait for this rank
            return received
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank: int, ranks: int, meeting: Path, models: Sequence[Any], answers: Any) -> None:
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins import load_plugins

    torch.set_num_threads(1)
    load_plugins()
    current_platform.init_backend()
    try:
        answers.put([_one(rank, ranks, meeting / str(index), *each) for index, each in enumerate(models)])
    except BaseException:
        answers.put(traceback.format_exc())
        raise


def _one(
    rank: int, ranks: int, meeting: Path, folder: Path, weights: dict[str, Tensor], more: dict[str, Any]
) -> tuple[list[str], float]:
    from sglang_rollout.loader_reads import loader_reads

    model = _model(rank, ranks, meeting, folder, more)
    share = tuple(TensorInfo.of(name, tensor) for name, tensor in weights.items())
    before = _state(model)
    shards = loader_reads(model, share)
    faults = [f"written while probing: {name}" for name in _differences(_state(model), before)]
    load: Any = model.load_weights
    load(list(weights.items()))
    expected = _state(model)
    if not _differences(expected, before):
        faults.append("the loader changed no weight")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    load(_only_what_is_read(weights, share, shards))
    faults += [f"read, but not sent: {name}" for name in _differences(_state(model), expected)]
    _leave()
    return faults, read_bytes(share, shards) / read_bytes(share, None)


def _only_what_is_read(weights: dict[str, Tensor], share: Manifest, shards: Any) -> list[tuple[str, Tensor]]:
    """As a receiver gives it to the loader, with NaN in what was not sent."""
    sent = [piece.contiguous().flatten().view(torch.uint8) for name in weights for piece in
            pieces(weights[name], name, shards)]  # fmt: skip
    empty = torch.empty

    def poisoned(*size: Any, **settings: Any) -> Tensor:
        return empty(*size, **settings).fill_(torch.nan)

    torch.empty = poisoned
    try:
        return list(views(torch.cat(sent), share, shards))
    finally:
        torch.empty = empty


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not one[name].equal(other[name])]


def _model(rank: int, ranks: int, meeting: Path, folder: Path, more: dict[str, Any]) -> nn.Module:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.bootstrap import _init_parallel_groups
    from sglang.srt.model_loader import get_model
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    from sglang_rollout.arguments import sglang_arguments

    arguments = sglang_arguments(folder, "bfloat16", EngineConfig(tensor=ranks), 0) | more
    server = ServerArgs(**arguments)
    set_global_server_args_for_scheduler(server)
    config = ModelConfig.from_server_args(server)
    _init_parallel_groups(
        backend="gloo",
        dist_init_method=f"file://{meeting}",
        server_args=server,
        model_config=config,
        gpu_id=rank,
        tp_rank=rank,
        tp_size=ranks,
        pp_rank=0,
        pp_size=1,
        attn_dp_size=1,
        attn_cp_size=1,
        moe_ep_size=server.ep_size,
        moe_dp_size=1,
        dcp_size=1,
    )
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


def _leave() -> None:
    from sglang.srt.distributed import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
