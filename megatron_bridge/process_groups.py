"""Forms the ranks' process groups, and raises rank 0's failures on every rank, so that no rank hangs."""

from collections.abc import Callable

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_bridge.atomic_folder import WRITE_FAILURES, reason_and_file
from treepo.config.trainer import ParallelConfig
from treepo.errors import CheckpointError


def form_groups(parallel: ParallelConfig, with_gloo: bool = True) -> None:
    """Form Megatron-Core's parallel groups. torch.distributed must be initialised.

    with_gloo: form groups for tensors in host memory too.
    """
    chunks = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        chunks if chunks > 1 else None,
        # The model's config is left at 1: Megatron-Core divides tokens for its own attention and rotary
        # embeddings by it, and ours are divided by work (treepo.learning.slicing).
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=with_gloo,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # Megatron-Core insists; the model uses none


def leave_groups() -> None:
    """Undo `form_groups` and torch.distributed's initialisation."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def on_first_rank(write: Callable[[], None], what: str) -> None:
    """Run `write` on rank 0 alone. Collective.

    If a file or folder cannot be written there, every rank raises the same CheckpointError, which begins with
    `what`.
    """
    failure = ""
    if dist.get_rank() == 0:
        try:
            write()
        except WRITE_FAILURES as error:
            failure = f"{what}: {reason_and_file(error)}"
    raise_everywhere(failure)


def raise_everywhere(failure: str) -> None:
    """Raise rank 0's `failure` as a CheckpointError on every rank, unless it is empty. Collective."""
    shared = [failure]
    dist.broadcast_object_list(shared, src=0)
    if shared[0]:
        raise CheckpointError(shared[0])
