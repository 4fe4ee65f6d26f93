"""Variables of engines and trainer ranks: what each needs, and the user's own values first."""

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
    assert engine_environment(4) == {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}
    assert engine_environment(4).items() <= trainer_environment(4, config()).items()


def test_the_trainers_segments_expand_and_an_engines_do_not() -> None:
    assert trainer_environment(1, config())["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not any("ALLOC_CONF" in name for name in engine_environment(1))


@pytest.mark.parametrize(("tensor", "connections"), [(1, None), (2, "1")])
def test_kernels_queue_with_tensor_parallelism(tensor: int, connections: str | None) -> None:
    run = config(trainer={"parallel": {"tensor": tensor}})
    assert trainer_environment(1, run).get("CUDA_DEVICE_MAX_CONNECTIONS") == connections


@pytest.mark.parametrize("transport", ["colocated", "broadcast", "host_broadcast", "disk"])
def test_ranks_of_the_engines_communicator_have_sglangs_nccl_settings(transport: str) -> None:
    variables = trainer_environment(1, config(weights={"transport": transport}))
    sglangs = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"} if transport == "broadcast" else {}
    assert {name: value for name, value in variables.items() if name.startswith("NCCL")} == sglangs


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
    assert trainer_environment(1, run) == given


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
