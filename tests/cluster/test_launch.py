"""`treepo launch` on two hosts, with real Ray, SGLang and Megatron-Core across a network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import psutil
import pytest

from tests.support.command import write_model_and_problems
from tests.support.paths import ROOT
from tests.support.two_hosts import Host, two_hosts
from treepo.cluster.ray_node import free_ports

pytestmark = pytest.mark.slow

QUICKSTART = ROOT / "examples/quickstart.yaml"
SECONDS = 600


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short path, because the sockets below it may have paths of at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="tp", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def launch(
    host: Host | None, folder: Path, ray_folder: Path, *arguments: object, cpus: int = 1
) -> subprocess.Popen[str]:
    """Launch the quickstart with a random model, and trainer and engine on devices of their own.

    host: one of two hosts; None is this machine alone. cpus: of each host.
    """
    shutil.copy(QUICKSTART, folder)
    overrides = [
        *("model.path=model", "data.train=train.jsonl", "data.heldout=null", "data.max_prompt_tokens=224"),
        *("data.prompts_per_step=4", "steps=3", "placement=split", "weights.transport=broadcast"),
    ]
    program = [sys.executable, "-c", "from treepo.cli.main import main; main()", "launch", QUICKSTART.name]
    command = [*program, *overrides, *map(str, arguments)]
    # The hosts do not have this machine's interfaces.
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    return subprocess.Popen(
        command if host is None else host.command(*command, "--nodes", "2", "--cpus", str(cpus)),
        cwd=folder,
        env=environment | {"RAY_TMPDIR": str(ray_folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_hosts(tmp_path: Path, ray_folder: Path) -> None:
    """Each host can hold the trainer or the engine; weights are sent by gloo. The driver is killed after the
    first checkpoint, and started again. Meanwhile, on the first host, another launch waits for a second node
    that never comes.
    """
    write_model_and_problems(tmp_path, tmp_path / "train.jsonl", count=8)
    with two_hosts() as hosts:
        head, other_head = (f"{hosts[0].address}:{port}" for port in free_ports(2))
        ours = ("out=run", "checkpoint.every=1")
        ranks = [
            launch(host, tmp_path, ray_folder, *ours, "--node-rank", rank, "--head", head)
            for rank, host in enumerate(hosts)
        ]
        alone = ("out=lonely", "--node-rank", 0, "--head", other_head, "--wait", 1)
        lonely = launch(hosts[0], tmp_path, ray_folder, *alone)
        lonely_output, _ = lonely.communicate(timeout=SECONDS)
        _kill_the_driver_after_a_checkpoint(tmp_path / "run", ranks)
        outputs = [process.communicate(timeout=SECONDS)[0] for process in ranks]

        assert [process.returncode for process in ranks] == [0, 0], "\n---\n".join(outputs)
        assert outputs[0].count("all devices are there") == 2
        crash = "the training ended with exit code 137; restart 1 of 3 in 5 s, from the checkpoint of step "
        assert crash in outputs[0]
        assert "the head starts Ray again" in outputs[1]
        assert "3/3" in outputs[0]
        assert "What the run came to" in outputs[0]
        assert "\x1b" not in outputs[0], "lines must be plain if the output is not a terminal"
        assert outputs[1].endswith("the head has ended with exit code 0\n")
        _assert_trained_apart(tmp_path / "run", hosts)

        assert lonely.returncode == 1, lonely_output
        assert re.search(r"still missing after 1 s: [01] of 2 nodes, .* waiting for node 1", lonely_output)
        assert not (tmp_path / "lonely").exists()
        assert not list(tmp_path.glob(".*.launch-*"))

        assert [host.processes() for host in hosts] == [[], []], "something was left running"
        assert list(ray_folder.iterdir()) == []


def _kill_the_driver_after_a_checkpoint(run: Path, ranks: list[subprocess.Popen[str]]) -> None:
    while not (run / "checkpoints" / "step-00001").exists():
        assert all(process.poll() is None for process in ranks), "it ended before the first checkpoint"
        time.sleep(0.05)
    os.kill(json.loads((run / ".lock").read_text())["process"], signal.SIGKILL)


def _assert_trained_apart(run: Path, hosts: tuple[Host, Host]) -> None:
    log = (run / "log.txt").read_text()
    addresses = {host.address for host in hosts}
    trainer, engine = (
        re.findall(rf"(\S+): {what} 0\n", log) for what in ("trainer ranks", "engines")
    )  # of both starts: the second may place them the other way round
    assert len(trainer) == len(engine) == 2
    assert all({*pair} == addresses for pair in zip(trainer, engine, strict=True))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    trees = [json.loads(line) for line in (run / "trees.jsonl").read_text().splitlines()]
    assert [tree["step"] for tree in trees] == [step for step in (1, 2, 3) for _ in range(4)]
    # Float32 on both sides; the same tokens through two implementations of two layers.
    assert all(line["logprob_difference_max"] < 1e-4 for line in metrics)
    assert (run / "checkpoint" / "model.safetensors").exists()


def test_an_engine_over_two_hosts(tmp_path: Path, ray_folder: Path) -> None:
    """Its pipeline stages are on one host each, and take the trainer's weights by gloo. One stage is killed:
    the engine starts again on both hosts, with the current weights.
    """
    write_model_and_problems(tmp_path, tmp_path / "train.jsonl", count=8)
    run = tmp_path / "run"
    with two_hosts() as hosts:
        head = f"{hosts[0].address}:{free_ports(1)[0]}"
        ours = ("out=run", "engine.pipeline=2", "engine.nodes=2", "weights.transport=host_broadcast")
        ranks = [
            launch(host, tmp_path, ray_folder, *ours, "--node-rank", rank, "--head", head, cpus=2)
            for rank, host in enumerate(hosts)
        ]
        while not _has_stepped(run):
            assert all(process.poll() is None for process in ranks), "it ended before the first step"
            time.sleep(0.05)
        stages = {host.address: [pid for pid in host.processes() if _is_stage(pid)] for host in hosts}
        assert [len(of_host) for of_host in stages.values()] == [1, 1]
        first, further = _places_of_shares(run)
        assert {first, further} == set(stages)
        os.kill(stages[further][0], signal.SIGKILL)
        outputs = [process.communicate(timeout=SECONDS)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], "\n---\n".join(outputs)
        assert [host.processes() for host in hosts] == [[], []], "something was left running"
    assert (run / "log.txt").read_text().count("engine 0 serves again") == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    # Float32 on both sides, as above: every step's trees were sampled with the weights of their version.
    assert all(line["logprob_difference_max"] < 1e-4 for line in metrics)


def _places_of_shares(run: Path) -> list[str]:
    """The addresses of the hosts of share 0 and share 1."""
    log = (run / "log.txt").read_text()
    places = re.findall(r"(\S+): (?:trainer ranks 0; )?engines 0 \(share (\d)\)\n", log)
    return [address for address, _ in sorted(places, key=itemgetter(1))]


def _has_stepped(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def _is_stage(pid: int) -> bool:
    """Whether it is a process of SGLang that holds a stage."""
    try:
        return "scheduler_PP" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False


def test_one_machine_trains_until_it_is_terminated(tmp_path: Path, ray_folder: Path) -> None:
    write_model_and_problems(tmp_path, tmp_path / "train.jsonl", count=8)
    process = launch(None, tmp_path, ray_folder, "out=run", "steps=1000")
    assert process.stdout is not None
    output = ""
    while "1/1000" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    ours = [one for one in psutil.process_iter() if _environment(one).get("RAY_TMPDIR") == str(ray_folder)]
    assert len(ours) > 5  # of Ray, the training and the engine
    process.terminate()
    output += process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 143, output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert not alive
    assert list(ray_folder.iterdir()) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 1


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_a_wrong_configuration_ends_the_launch_before_anything_starts(
    tmp_path: Path, ray_folder: Path
) -> None:
    with two_hosts() as hosts:
        head = f"{hosts[0].address}:{free_ports(1)[0]}"
        ranks = [
            launch(host, tmp_path, ray_folder, "--node-rank", rank, "--head", head, "--wait", 3)
            for rank, host in enumerate(hosts)
        ]
        outputs = [process.communicate(timeout=SECONDS)[0] for process in ranks]
        assert ranks[0].returncode == 2, outputs[0]
        assert "error: model: " in outputs[0]
        assert ranks[1].returncode != 0  # 2 if it connected in time to get the exit code
        assert not any("Ray" in output for output in outputs)
        assert list(ray_folder.iterdir()) == []
