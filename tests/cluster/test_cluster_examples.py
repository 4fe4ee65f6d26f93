"""The scripts and the manifest in examples/cluster parse, call existing commands and agree in numbers."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT
from treepo.cluster.placement import Node, demand, plan, run_layout
from treepo.config.load import load_config

FOLDER = ROOT / "examples/cluster"
CONFIG = "examples/cluster/two_nodes.yaml"


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment whose `srun` and `treepo` print their arguments."""
    for name in ("srun", "bin/treepo", ".venv/bin/treepo"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/sh\necho {file.name} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def script(name: str, *arguments: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    result = subprocess.run(
        ["bash", FOLDER / name, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, (result.stdout or result.stderr).strip()


def test_the_configuration_needs_both_nodes() -> None:
    config = load_config(ROOT / CONFIG)
    nodes = [Node(name, name, 64, 8) for name in "ab"]
    assert demand(run_layout(config), nodes)[0] == 16
    placed = plan(run_layout(config), nodes)
    trainers, engines = (
        {node.id for bundle, node in placed if getattr(bundle, what)} for what in ("ranks", "shares")
    )
    assert len(trainers) == len(engines) == 1
    assert trainers != engines


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_shell(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK)


def test_the_script_for_slurm(tmp_path: Path, tools: dict[str, str]) -> None:
    text = (FOLDER / "slurm.sh").read_text()
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --requeue\n" in text
    environment = tools | {"SLURM_CPUS_PER_TASK": "32"}
    srun = "srun --kill-on-bad-exit=1 --cpus-per-task=32"
    assert script("slurm.sh", folder=tmp_path, environment=environment) == (
        0,
        f"{srun} .venv/bin/treepo launch {CONFIG} --resume",
    )
    arguments = ("mine.yaml", "steps=3")
    assert script(
        "slurm.sh", *arguments, folder=tmp_path, environment=environment | {"TREEPO_IMAGE": "image"}
    ) == (
        0,
        f"{srun} --container-image=image --container-mounts={tmp_path}:{tmp_path} "
        f"--container-workdir={tmp_path} treepo launch mine.yaml --resume steps=3",
    )


def test_the_script_for_two_machines(tmp_path: Path, tools: dict[str, str]) -> None:
    assert script("two_nodes.sh", "1", "10.0.0.1:7000", "steps=3", folder=tmp_path, environment=tools) == (
        0,
        f"treepo launch {CONFIG} --nodes 2 --node-rank 1 --head 10.0.0.1:7000 steps=3",
    )
    for wrong in ((), ("0",), ("2", "head")):
        code, message = script("two_nodes.sh", *wrong, folder=tmp_path, environment=tools)
        assert code == 2
        assert message.startswith("usage: ")


def test_the_manifest_for_kubernetes() -> None:
    manifest = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    assert manifest["kind"] == "RayJob"
    cluster = manifest["spec"]["rayClusterSpec"]
    # KubeRay does not quote it: nothing that a shell would read may be in it.
    command = re.fullmatch(r"treepo launch (\S+) --nodes (\d+) --resume", manifest["spec"]["entrypoint"])
    assert command is not None
    config = load_config(ROOT / command[1])

    groups = cluster["workerGroupSpecs"]
    assert int(command[2]) == 1 + sum(group["replicas"] for group in groups)
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    workers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    gpus = sum(
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group, container in zip(groups, workers, strict=True)
    )
    assert demand(run_layout(config), [Node("a", "a", 1, 1)])[0] == gpus
    assert "nvidia.com/gpu" not in head["resources"]["limits"]

    pyproject = (ROOT / "pyproject.toml").read_text()
    for container in (head, *workers):
        name, _, version = container["image"].partition(":")
        assert name == "treepo"
        assert f'version = "{version}"' in pyproject
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {container["workingDir"], "/dev/shm"}
    assert f"ray[default]=={cluster['rayVersion']}" in pyproject
    environment = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]
    from treepo.cluster.ray_job import STOP_SECONDS  # Ray's import takes a second

    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > STOP_SECONDS
