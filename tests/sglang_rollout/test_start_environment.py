"""The variables that SGLang's processes start with, and the libraries that pip installed."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from sglang_rollout import cuda_toolkit, start_environment
from sglang_rollout.cuda_toolkit import cuda_variables, found_toolkit, pip_runtime, pip_toolkit
from sglang_rollout.rank_store import LOOPBACK, Meeting
from treepo.config.engine import EngineConfig
from treepo.errors import EngineError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def package(root: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """An environment whose CUDA packages have these files."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()

    def file_of(_package: str, name: str) -> Path | None:
        return next((root / file for file in files if Path(file).name == name), None)

    monkeypatch.setattr(cuda_toolkit, "_file_of", file_of)


def started(config: EngineConfig, shares_device: bool) -> dict[str, str]:
    with start_environment.start_environment(config, shares_device, Meeting(LOOPBACK, 1, share=0)):
        return dict(os.environ)


def test_the_loader_and_the_linker_find_the_runtime_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    package(tmp_path, monkeypatch, "cu13/lib/libcudart.so.13")
    given = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/mine", "LIBRARY_PATH": "/also"}
    for _ in range(2):  # the second time, the link is there
        variables = cuda_variables(given)
        assert variables["LD_LIBRARY_PATH"] == f"{tmp_path}/cu13/lib:/mine"
        mine, _, link = variables["LIBRARY_PATH"].partition(":")
        assert mine == "/also"
        assert (Path(link) / "libcudart.so").resolve() == tmp_path / "cu13/lib/libcudart.so.13"
    assert cuda_variables({})["LD_LIBRARY_PATH"] == f"{tmp_path}/cu13/lib"


def test_a_torch_with_a_runtime_of_its_own_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch)
    assert not {"LD_LIBRARY_PATH", "LIBRARY_PATH", "CUDA_HOME"} & set(cuda_variables({"PATH": "/usr/bin"}))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    package(tmp_path, monkeypatch, "cu13/lib/libcudart.so.13")
    (tmp_path / "cache").touch()
    with pytest.raises(EngineError, match="XDG_CACHE_HOME"):
        cuda_variables({})


def test_pips_toolkit_is_used_only_if_sglang_finds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_toolkit, "_SYSTEM_TOOLKIT", tmp_path / "none")
    package(tmp_path, monkeypatch, "cu13/bin/nvcc", "cu13/include/cuda_runtime.h")
    assert cuda_variables({"PATH": "/nowhere"})["CUDA_HOME"] == f"{tmp_path}/cu13"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        assert "CUDA_HOME" not in cuda_variables({variable: "/opt/cuda", "PATH": "/nowhere"})
        assert found_toolkit({variable: "/opt/cuda"}) == Path("/opt/cuda")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.touch(mode=0o755)
    assert found_toolkit({"PATH": str(nvcc.parent)}) == tmp_path
    (tmp_path / "none").mkdir()
    assert found_toolkit({"PATH": "/nowhere"}) == tmp_path / "none"


def test_a_compiler_without_the_runtimes_headers_is_no_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before CUDA 13, where pip installs each in a folder of its own."""
    package(tmp_path, monkeypatch, "cuda_nvcc/bin/nvcc", "cuda_runtime/include/cuda_runtime.h")
    assert pip_toolkit() is None


def test_what_pip_installed_here_is_found() -> None:
    runtime, toolkit = pip_runtime(), pip_toolkit()
    assert runtime is not None
    assert runtime.is_file()
    assert toolkit is not None
    shown = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    )
    assert "Cuda compilation tools" in shown.stdout


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("setting", "left"),
    [
        ("expandable_segments:True", None),
        ("max_split_size_mb:64, expandable_segments:True", "max_split_size_mb:64"),
        (
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:True",
            "roundup_power2_divisions:[256:1,512:2]",
        ),
        ("max_split_size_mb:64", "max_split_size_mb:64"),
    ],
)
def test_an_engine_with_the_memory_saver_has_no_expandable_segments(
    monkeypatch: pytest.MonkeyPatch, name: str, setting: str, left: str | None
) -> None:
    monkeypatch.setenv(name, setting)
    assert started(EngineConfig(), shares_device=True).get(name) == left
    assert started(EngineConfig(), shares_device=False)[name] == setting
    assert os.environ[name] == setting


def test_libraries_are_for_gpus_and_shares_of_cores_for_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    package(tmp_path, monkeypatch, "cu13/lib/libcudart.so.13")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    config = EngineConfig(tensor=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = started(config, shares_device=False)
    assert on_cpu["OMP_NUM_THREADS"] == "2"
    assert "LD_LIBRARY_PATH" not in on_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = started(config, shares_device=False)
    assert on_gpu["OMP_NUM_THREADS"] == "8"
    assert on_gpu["LD_LIBRARY_PATH"] == f"{tmp_path}/cu13/lib"
    assert "LD_LIBRARY_PATH" not in os.environ
