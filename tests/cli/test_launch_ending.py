"""SIGTERM and Ctrl-C end every node of a `treepo launch`; Ray and its job server are fakes."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.command import heed_interrupts
from tests.support.paths import ROOT
from treepo.cli.launch import TrainingOutput
from treepo.cluster.ray_node import free_ports

COMMAND = """
import asyncio, subprocess, sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

from treepo.cli.main import main
from treepo.cluster import launch as launch_module, ray_node
from treepo.cluster.placement import Node
from treepo.preflight import inputs

class Ray:
    async def ended(self):
        await asyncio.Event().wait()

@asynccontextmanager
async def start(*_):
    nowhere = subprocess.DEVNULL
    child = subprocess.Popen(["sleep", "600"], stdout=nowhere, stderr=nowhere, start_new_session=True)
    Path(f"ray-{child.pid}").touch()
    print("Ray is process", child.pid, flush=True)
    try:
        yield Ray()
    finally:
        child.kill()
        child.wait()

class JobServer:
    async def nodes(self):
        return [Node(ray.name, "127.0.0.1", 64, 0) for ray in Path().glob("ray-*")]

    async def run(self, command, write):
        write("step 1\\n")
        try:
            await asyncio.Event().wait()
        finally:
            write("Interrupted. All processes have ended; this is the training's own line\\n")
            write("error: the disk is full\\n")
            if "hangs" in sys.argv[0]:
                await asyncio.Event().wait()

ray_job = ModuleType("treepo.cluster.ray_job")
async def job_server(*_):
    return JobServer()
ray_job.job_server = job_server
sys.modules["treepo.cluster.ray_job"] = ray_job
launch_module.ray_head = launch_module.ray_worker = start
inputs.read_train_inputs = lambda _: None
main()
"""
LEFT = "All processes have ended; the files so far are in run/"
OF_THE_NODE = "All processes have ended; the head tells what the run leaves"


class Launch:
    """A head and another node, whose training has begun. rays: the processes of each node's Ray."""

    def __init__(self, folder: Path, kind: str) -> None:
        (port,) = free_ports(1)
        program = folder / f"{kind}.py"
        program.write_text(COMMAND)
        self.nodes = [
            subprocess.Popen(
                [
                    *(sys.executable, program, "launch", ROOT / "examples/quickstart.yaml", "out=run"),
                    *("--nodes", "2", "--node-rank", str(rank), "--head", f"127.0.0.1:{port}"),
                ],
                cwd=folder,
                env={"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=heed_interrupts,
            )
            for rank in range(2)
        ]
        self.rays = [psutil.Process(int(self._until(rank, "Ray is process").split()[-1])) for rank in (0, 1)]
        self._until(0, "step 1")

    def _until(self, rank: int, text: str) -> str:
        output = self.nodes[rank].stdout
        assert output is not None
        for line in output:
            if text in line:
                return line
        raise AssertionError(self.nodes[rank].communicate())

    def ends(self) -> list[tuple[int, str, str]]:
        """Exit code, further output and errors of each node. Nothing of Ray is left."""
        ends = [(node, *node.communicate(timeout=60)) for node in self.nodes]
        assert not psutil.wait_procs(self.rays, timeout=60)[1]
        return [(node.returncode, output, errors) for node, output, errors in ends]


def test_a_signal_on_the_head_ends_all_nodes(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "works")
    launch.nodes[0].send_signal(signal.SIGTERM)
    head, node = launch.ends()
    assert head == (143, "error: the disk is full\n", f"Interrupted by SIGTERM. {LEFT}\n")
    assert node[0] == 143
    assert node[1].splitlines()[-1] == "launch: the head has ended with exit code 143"
    assert node[2] == ""
    assert not [*tmp_path.glob(".run.launch-*")]


def test_a_signal_on_all_nodes_is_one_line_on_each(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "works")
    for node in launch.nodes:
        node.send_signal(signal.SIGTERM)
    head, node = launch.ends()
    assert (head[0], head[2]) == (143, f"Interrupted by SIGTERM. {LEFT}\n")
    assert (node[0], node[2]) == (143, f"Interrupted by SIGTERM. {OF_THE_NODE}\n")


def test_a_second_signal_kills_a_training_that_hangs_and_the_other_node_ends_too(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "hangs")
    launch.nodes[0].send_signal(signal.SIGINT)
    launch._until(0, "error: the disk is full")
    launch.nodes[0].send_signal(signal.SIGINT)
    head, node = launch.ends()
    assert (head[0], head[2]) == (130, f"Interrupted. {LEFT}\n")
    assert node[0] == 130
    assert node[1].splitlines()[-1] == "launch: the head has ended with exit code 130"


def test_of_a_training_that_is_ended_only_errors_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ends = False
    output = TrainingOutput(lambda: ends)
    output.write("step 1\nste")
    ends = True
    for text in ("p 2\nInterrupted. ", "\nerr", "or: it broke\nmore", "\n"):
        output.write(text)
    assert capsys.readouterr().out == "step 1\nsteerror: it broke\n"
