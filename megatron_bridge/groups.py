"""Megatron-Core's parallel groups of a layout."""

from megatron.core import parallel_state, tensor_parallel

from treepo.config.trainer import ParallelConfig


def form_groups(parallel: ParallelConfig, with_gloo: bool = True) -> None:
    """Once the process group is initialised. with_gloo: groups for what travels by the host, too."""
    chunks = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        chunks if chunks > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=with_gloo,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # Megatron-Core insists; nothing random is left
