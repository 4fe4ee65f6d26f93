"""Hooks in SGLang's scheduler process: routes survive retractions, and travel in a byte or two an expert.

A request that SGLang retracts, because its KV cache is full, gives up its slots, and computes its context and
tokens again later; at its end SGLang would return the experts of that second computation. Here those of the
first are set aside before the slots go: with them the tokens were sampled and their log-probs computed.
"""

from pathlib import Path
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from sglang_rollout.routes import RouteFormat

_KEPT = "treepo_routes"  # the attribute of a retracted request


def register_hooks(model: Path) -> None:
    """Before SGLang's scheduler starts on the model of this folder."""
    dtype = getattr(torch, RouteFormat.of(model).dtype.name)

    def shrink(_result: None, _processor: Any, request: Any) -> None:
        """Hook after the experts of a finished request were collected."""
        if request.routed_experts is not None:
            request.routed_experts = _with_kept(request, request.routed_experts).to(dtype)

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.batch_result_processor."
        "SchedulerBatchResultProcessor._maybe_collect_routed_experts",
        shrink,
        HookType.AFTER,
    )
    HookRegistry.register("sglang.srt.managers.schedule_batch.release_req", keep, HookType.BEFORE)


def keep(*_: Any, req: Any, req_to_token_pool: Any, **__: Any) -> None:
    """Hook before a request is retracted: set aside the experts of all tokens that it has read.

    A request without a sampled token has nothing to keep: its context may not even be computed yet.
    """
    capturer = get_global_experts_capturer()
    if capturer is None or not req.return_routed_experts or not req.output_ids:
        return
    length = len(req.origin_input_ids) + len(req.output_ids)
    recorded = capturer.get_topk(req.req_pool_idx, length, req_to_token_pool, req.routed_experts_start_len)
    setattr(req, _KEPT, _with_kept(req, recorded))


def _with_kept(request: Any, recorded: torch.Tensor) -> torch.Tensor:
    """`recorded` ([T, layers, k]), with what was set aside in place of its first rows."""
    kept = getattr(request, _KEPT, None)
    return recorded if kept is None else torch.cat([kept, recorded[len(kept) :]])
