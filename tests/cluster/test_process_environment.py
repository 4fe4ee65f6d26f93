"""Variables of engines and trainer ranks: what each needs, and the user's own values first."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.plan_configs import config
from treepo.cluster.placement import Node
from treepo.cluster.process_environment import engine_environment, threads_of, trainer_environment


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)


def test_threads_wait_passively_everywhere() -> None:
    assert engine_environment(4, on_gpus=True) == {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}
    assert (
        engine_environment(4, on_gpus=True).items() <= trainer_environment(4, config(), on_gpus=True).items()
    )


def test_the_trainers_segments_expand_and_an_engines_do_not() -> None:
    assert (
        trainer_environment(1, config(), on_gpus=True)["PYTORCH_CUDA_ALLOC_CONF"]
        == "expandable_segments:True"
    )
    assert not any("ALLOC_CONF" in name for name in engine_environment(1, on_gpus=True))


def test_a_cluster_without_gpus_sees_none() -> None:
    """`treepo launch --gpus 0` on a machine that has some: torch would take them."""
    for variables in (engine_environment(1, on_gpus=False), trainer_environment(1, config(), on_gpus=False)):
        assert not variables["CUDA_VISIBLE_DEVICES"]
    assert "CUDA_VISIBLE_DEVICES" not in engine_environment(1, on_gpus=True), "Ray sets it"


@pytest.mark.parametrize(("tensor", "connections"), [(1, None), (2, "1")])
def test_kernels_queue_with_tensor_parallelism(tensor: int, connections: str | None) -> None:
    run = config(trainer={"parallel": {"tensor": tensor}})
    assert trainer_environment(1, run, on_gpus=True).get("CUDA_DEVICE_MAX_CONNECTIONS") == connections


@pytest.mark.parametrize("transport", ["colocated", "host_broadcast", "disk"])
def test_a_communicator_of_the_trainer_alone_has_nccls_defaults(transport: str) -> None:
    variables = trainer_environment(1, config(weights={"transport": transport}), on_gpus=True)
    assert not any(name.startswith("NCCL") for name in variables)


@pytest.mark.parametrize("user", [{}, {"NCCL_CUMEM_ENABLE": "1"}, {"NCCL_NVLS_ENABLE": "1"}])
@pytest.mark.parametrize("arguments", [{}, {"enable_nccl_nvls": True}, {"enable_symm_mem": True}])
def test_ranks_of_the_engines_communicator_have_sglangs_nccl_settings(
    arguments: dict[str, bool], user: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    run = config(weights={"transport": "broadcast"}, engine={"sglang": arguments})
    variables = trainer_environment(1, run, on_gpus=True)
    ours = {name: value for name, value in variables.items() if name.startswith("NCCL")}
    assert ours == sglangs_nccl_settings(arguments, user)


def sglangs_nccl_settings(arguments: dict[str, bool], user: dict[str, str]) -> dict[str, str]:
    """The variables of NCCL in SGLang's processes: the installed SGLang's own statements, executed.

    Its module is read, not imported, which would take seconds.
    """
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "srt/entrypoints/engine.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "_set_envs_and_config"
    )
    statements = [node for node in function.body if "NCCL_" in ast.unparse(node)]
    defaults = {"enable_symm_mem": False, "enable_nccl_nvls": False, "dcp_size": 1}
    environment = dict(user)
    names = {
        "os": SimpleNamespace(environ=environment),
        "server_args": SimpleNamespace(**defaults | arguments),
    }
    exec(ast.unparse(ast.Module(statements, [])), names)
    return environment


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_settings_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "active",
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "NCCL_CUMEM_ENABLE": "1",
        "NCCL_NVLS_ENABLE": "1",
        name: "max_split_size_mb:64",
    }
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    run = config(trainer={"parallel": {"tensor": 2}}, weights={"transport": "broadcast"})
    assert trainer_environment(1, run, on_gpus=True) == given


@pytest.mark.parametrize(
    ("cores", "gpus", "processes", "threads"),
    [
        (128, 8, 8, 16),  # a GPU's share, however many processes the run has
        (128, 8, 1, 16),
        (4, 8, 8, 1),
        (8, 0, 2, 4),  # without GPUs, all cores for the processes of one kind
        (8, 0, 0, 8),
        (2, 0, 5, 1),
    ],
)
def test_threads(cores: int, gpus: int, processes: int, threads: int) -> None:
    assert threads_of(Node("id", "name", cores, gpus), cores, processes) == threads
