"""Prepares a process for Megatron-Core: silences its start-up messages, and serves its CUDA calls on a CPU.

Import it before Megatron-Core, which prints most of those messages while it is being imported.
"""

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

# The user can do nothing about these.
_WARNINGS = (
    r".*Apex (is|are) not installed",  # we use torch's norm and optimizer
    "full scope is deprecated",  # of CUDA graphs, which we do not set
    "MimoModelConfig is experimental",  # imported by the optimizer, not used
    "TypedStorage is deprecated",  # with which Megatron-Core frees its gradients
    "`sequence_parallel` is set to `True`, but tensor",  # about experts, which are whole on their rank
)
_LOGGERS = (
    "megatron.core.models.gpt.gpt_model",  # announces its successor, HybridModel
    "torch.utils.cpp_extension",  # reports that there is no CUDA
    "megatron.core.distributed.distributed_data_parallel",  # warns of the layout that it makes itself
)

for _message in _WARNINGS:
    warnings.filterwarnings("ignore", message=_message)
for _name in _LOGGERS:
    logging.getLogger(_name).setLevel(logging.ERROR)


def on_device() -> AbstractContextManager:
    """Enter this around every call into Megatron-Core. Without CUDA, the CPU serves its CUDA calls."""
    if torch.cuda.is_available():
        return nullcontext()
    # Imported here: it replaces functions of torch.cuda, which must not happen on a machine with CUDA.
    from megatron_bridge.cpu import device_functions

    device_functions.install()
    return device_functions.CudaAsCpu()
