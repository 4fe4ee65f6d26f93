"""The main function of SGLang's scheduler processes: SGLang's own, with our hooks."""

from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.scheduler import run_scheduler_process

from sglang_rollout import route_record, served_adapter


def run_scheduler(server_args: Any, *arguments: Any) -> None:
    """SGLang applies the hooks that are registered here when it starts."""
    if server_args.enable_return_routed_experts:
        route_record.register_hooks(Path(server_args.model_path))
    if server_args.enable_lora:
        served_adapter.register_hooks()
        if not torch.cuda.is_available():
            from sglang_rollout.cpu import unpinned

            unpinned.register_hooks()
    run_scheduler_process(server_args, *arguments)
