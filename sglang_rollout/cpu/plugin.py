"""The entry point through which SGLang finds our CPU platform.

SGLang's own CPU platform needs a build of sgl_kernel that no registry carries. An out-of-tree platform
takes plain torch paths instead, so the real engine (radix cache, continuous batching, online weight
updates) runs on any x86 or Arm CPU. The class lives in a module of its own: SGLang calls `activate` while
its own modules still load, so nothing of SGLang may be imported here.
"""

import logging

import torch


def activate() -> str | None:
    """The platform class, as SGLang wants it named, or None where there is an accelerator."""
    if torch.cuda.is_available():
        return None
    # It warns of a CUDA toolkit without a CUDA device, which here is no news.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return "sglang_rollout.cpu.platform:CpuPlatform"
