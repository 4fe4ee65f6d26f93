"""CUDA's compiler and libraries for SGLang's processes.

SGLang compiles kernels with nvcc when they are first used, links them with the CUDA runtime, and preloads a
library that needs the runtime. pip installs compiler and runtime, but not where a compiler, a linker and the
loader look for them.
"""

import hashlib
import importlib.metadata
import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

from treepo.errors import EngineError

_SYSTEM_TOOLKIT = Path("/usr/local/cuda")


def cuda_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What to change in `environment` for SGLang's processes on GPUs.

    The loader and the linker find the CUDA runtime that pip installed with torch; ninja, which pip installs
    beside Python, is on the PATH; and if SGLang would find no toolkit, it finds pip's. Raises EngineError if
    the linker's folder cannot be made.
    """
    variables = {"PATH": _joined(environment.get("PATH"), sysconfig.get_path("scripts"))}
    runtime = pip_runtime()
    if runtime is not None:
        # In front: a process must not load another runtime than torch does.
        variables["LD_LIBRARY_PATH"] = _joined(runtime.parent, environment.get("LD_LIBRARY_PATH"))
        variables["LIBRARY_PATH"] = _joined(environment.get("LIBRARY_PATH"), _linkable(runtime))
    if found_toolkit(environment) is None and (pips := pip_toolkit()) is not None:
        variables["CUDA_HOME"] = str(pips)
    return variables


def found_toolkit(environment: Mapping[str, str]) -> Path | None:
    """The toolkit that SGLang finds by itself (tvm_ffi/cpp/extension.py, deep_gemm/cuda_helpers.py)."""
    if home := environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        return Path(home)
    if nvcc := shutil.which("nvcc", path=environment.get("PATH")):
        return Path(nvcc).parent.parent
    return _SYSTEM_TOOLKIT if _SYSTEM_TOOLKIT.exists() else None


def pip_toolkit() -> Path | None:
    """The folder of pip's nvcc, if the runtime's headers are there too: so it is from CUDA 13 on."""
    nvcc = _file_of("nvidia-cuda-nvcc", "nvcc")
    home = nvcc and nvcc.parent.parent
    return home if home and (home / "include" / "cuda_runtime.h").is_file() else None


def pip_runtime() -> Path | None:
    """The CUDA runtime that pip installed for this torch; None if torch's is another."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    packages = ("nvidia-cuda-runtime", f"nvidia-cuda-runtime-cu{major}")  # from CUDA 13 on, and before
    found = (_file_of(package, f"libcudart.so.{major}") for package in packages)
    return next((file for file in found if file is not None), None)


def _file_of(package: str, name: str) -> Path | None:
    """An installed package's file of this name."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name == name)
    return next((file for file in found if file.is_file()), None)


def _linkable(runtime: Path) -> Path:
    """A folder in which a linker finds `runtime` as -lcudart; pip's has its name with the version only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "treepo" / f"cudart-{hashlib.sha256(bytes(runtime)).hexdigest()[:16]}"
    link = folder / "libcudart.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            new = folder / f"{link.name}.{os.getpid()}"  # several engines may start at once
            new.symlink_to(runtime)
            new.replace(link)
    except OSError as error:
        raise EngineError(
            f"{error.filename}: {error.strerror}; SGLang's kernels are linked through this folder: set "
            "XDG_CACHE_HOME to one that can be written"
        ) from None
    return folder


def _joined(*parts: object) -> str:
    return os.pathsep.join(str(part) for part in parts if part)
