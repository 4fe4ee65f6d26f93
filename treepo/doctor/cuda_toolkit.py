"""What SGLang's processes need of CUDA beside the driver: a compiler, a linker and the runtime's library.

Each check does what SGLang does, in the environment that its processes get.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp

from treepo.doctor.check import Outcome, failed, passed, skipped
from treepo.errors import one_line

_NO_GPU = "no GPU: CPU mode"
_SECONDS = 120.0  # for the compiler on a busy machine
_SOURCE = """
#include <cuda_runtime.h>
__global__ void kernel() {}
extern "C" int runtime_version() { int version = 0; cudaRuntimeGetVersion(&version); return version; }
"""
_LOAD = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).runtime_version())"
_INSTALL = (
    "pip install -c constraints.txt treepo brings one; or install a toolkit of torch's CUDA version and set "
    "CUDA_HOME to it"
)


def cuda_toolkit() -> Outcome:
    """Compile a kernel for this GPU, link it with the CUDA runtime and load it, as SGLang does."""
    import torch

    from sglang_rollout.cuda_toolkit import cuda_variables

    if not torch.cuda.is_available():
        return skipped(_NO_GPU)
    assert torch.version.cuda is not None
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | cuda_variables(os.environ)
    return try_toolkit(environment, f"sm_{major}{minor}", torch.version.cuda)


def try_toolkit(environment: Mapping[str, str], architecture: str, built: str) -> Outcome:
    """architecture: of the GPU, as nvcc names it. built: torch's CUDA version."""
    from sglang_rollout.cuda_toolkit import found_toolkit

    home = found_toolkit(environment)
    if home is None:
        return failed("no CUDA toolkit, with which SGLang compiles kernels", _INSTALL)
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return failed(f"the CUDA toolkit {home} has no bin/nvcc", _INSTALL)
    for program in ("c++", "ninja"):
        if shutil.which(program, path=environment.get("PATH")) is None:
            return failed(
                f"{program} is not on the PATH; SGLang compiles kernels with it", f"install {program}"
            )
    shown = re.search(r"release (\d+)\.(\d+)", _run([str(nvcc), "--version"], environment).stdout)
    version = f"{shown[1]}.{shown[2]}" if shown else "unknown"
    if version.split(".")[0] != built.split(".")[0]:
        return failed(
            f"{nvcc} is of CUDA {version}, torch was built with CUDA {built}",
            f"set CUDA_HOME to a toolkit of CUDA {built.split('.')[0]}; pip's is used if there is no "
            "CUDA_HOME, no nvcc on the PATH and no /usr/local/cuda",
        )
    folder = Path(mkdtemp())  # deleted with this check's temporary files
    (folder / "probe.cu").write_text(_SOURCE)
    source, compiled, library = (str(folder / name) for name in ("probe.cu", "probe.o", "probe.so"))
    steps = {
        "compile": [str(nvcc), f"-arch={architecture}", "-Xcompiler", "-fPIC", "-c", source, "-o", compiled],
        "link": ["c++", compiled, "-shared", f"-L{home / 'lib64'}", "-lcudart", "-o", library],
        "load": [sys.executable, "-c", _LOAD, library],
    }
    for step, command in steps.items():
        done = _run(command, environment)
        if done.returncode:
            return failed(
                f"nvcc {version} in {home}: a kernel does not {step}: {_last_line(done.stderr)}", _INSTALL
            )
    return passed(f"nvcc {version} in {home}; a kernel was compiled, linked and loaded")


def memory_saver() -> Outcome:
    """The library that is loaded into an engine's processes, so that they can release memory."""
    import torch
    from torch_memory_saver.utils import get_binary_path_from_package

    from sglang_rollout.cuda_toolkit import cuda_variables

    if not torch.cuda.is_available():
        return skipped(_NO_GPU)
    library = get_binary_path_from_package("torch_memory_saver_hook_mode_preload")
    return try_preload(library, os.environ | cuda_variables(os.environ))


def try_preload(library: Path, environment: Mapping[str, str]) -> Outcome:
    done = _run([sys.executable, "-c", ""], {**environment, "LD_PRELOAD": str(library)})
    if done.returncode or done.stderr:  # the loader warns about a library that it does not find, and goes on
        return failed(
            f"{library.name} does not load: {_last_line(done.stderr)}",
            "placement: colocated needs it: put the folder of the CUDA runtime that torch uses on "
            "LD_LIBRARY_PATH",
        )
    return passed(f"{library.name} loads")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=_SECONDS, check=False
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "no message"
