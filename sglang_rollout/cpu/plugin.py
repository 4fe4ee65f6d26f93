"""The entry point through which SGLang finds our CPU platform.

SGLang's own CPU platform needs a build of sgl_kernel that no registry carries. An out-of-tree platform takes
plain torch paths instead, so the real engine (radix cache, continuous batching, online weight syncs) runs
on any x86 or Arm CPU. SGLang calls `activate` while its own modules are still loading, so nothing of SGLang
is imported here and the platform class has a module of its own.
"""

import logging

import torch


def activate() -> str | None:
    """The path of the platform class, as SGLang expects it; None if there is an accelerator."""
    if torch.cuda.is_available():
        return None
    # It warns of a CUDA toolkit without a CUDA device, which is expected here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return "sglang_rollout.cpu.platform:CpuPlatform"
