"""A cluster's job server runs and interrupts a command; a launch uses a cluster that already runs."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.command import write_model_and_problems
from treepo.cluster.ray_node import NodeResources, free_ports, new_secrets, ray_head

pytestmark = pytest.mark.slow

# In a process of its own: Ray reads a cluster's secrets when it is imported.
SCENARIO = '''
import asyncio, os, sys
from ray.util.state import list_actors
from treepo.errors import ClusterError
from treepo.cluster.ray_job import job_server

DRIVER = f"""{sys.executable} -c '
import os, ray

@ray.remote(num_cpus=0)
class Witness:
    def pid(self):
        return os.getpid()

ray.init(log_to_driver=False)
witness = Witness.remote()
ray.get(witness.pid.remote())
os.kill(os.getpid(), 9)
'"""
CATCHES = "trap 'sleep 1; echo cleaned up; exit 130' INT; echo begun; while :; do sleep 0.1; done"

async def scenario(url):
    server = await job_server(url, 120)
    while not (nodes := await server.nodes()):
        await asyncio.sleep(0.2)
    print("nodes:", [(node.cpus, node.gpus) for node in nodes])
    said = []
    print("exit code:", await server.run("pwd; echo oops >&2; exit 2", said.append))
    # Ray's own line about the command may come after the command's first.
    print("said:", [line for line in "".join(said).splitlines() if line in ("oops", os.getcwd())])
    print("killed:", await server.run("kill -9 $$", said.append))
    print("died:", await server.run(DRIVER, said.append))
    await server.end_job()
    witnesses = [("class_name", "=", "Witness"), ("state", "!=", "DEAD")]
    print("left:", list_actors(sys.argv[1], filters=witnesses))
    said, begun = [], asyncio.Event()

    def write(text):
        said.append(text)
        if "begun" in "".join(said).splitlines():
            begun.set()

    running = asyncio.create_task(server.run(CATCHES, write))
    await begun.wait()
    running.cancel()
    await asyncio.wait((running,))
    print("cancelled:", running.cancelled(), "".join(said).splitlines()[-1])
    try:
        await job_server("http://127.0.0.1:9", 0.1)
    except ClusterError as error:
        print("nobody:", error)

asyncio.run(scenario(sys.argv[1]))
'''


STRANGER = """
import asyncio, sys
from treepo.cluster.ray_job import job_server

try:
    asyncio.run(job_server(sys.argv[1], 120))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_jobs_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that finds the cluster by RAY_ADDRESS checks its devices, and does not stop it."""
    monkeypatch.chdir(tmp_path)
    write_model_and_problems(tmp_path, tmp_path / "train.jsonl", count=4)
    config = {
        "out": "run",
        "steps": 1,
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "train.jsonl", "prompts_per_step": 4, "max_prompt_tokens": 224},
        "sampling": {"max_response_tokens": 32, "segment_tokens": 8, "width": 4},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    asyncio.run(_scenario(tmp_path))


async def _scenario(folder: Path) -> None:
    import ray

    host, (port, dashboard_port) = ray.util.get_node_ip_address(), free_ports(2)
    secrets = new_secrets({})
    async with ray_head(host, port, dashboard_port, NodeResources(cpus=1), secrets) as node:
        environment = os.environ | secrets
        url = f"http://127.0.0.1:{dashboard_port}"
        code, output = await _python(SCENARIO, url, environment=environment)
        assert code == 0, output
        assert "nodes: [(1, 0)]" in output, output
        assert "exit code: 2" in output
        assert f"said: ['{folder}', 'oops']" in output, output
        assert "killed: 137" in output, output
        assert "died: 137" in output, output
        assert "left: []" in output, output
        assert "cancelled: True cleaned up" in output
        assert "nobody: no answer from Ray's job server within 0.1 s" in output

        _, output = await _python(STRANGER, url, environment=os.environ | {"RAY_AUTH_MODE": "disabled"})
        assert output.startswith("ClusterError Ray's job server refuses: Authentication required"), output

        arguments = ("from treepo.cli.main import main; main()", "launch", "run.yaml", "--wait", "1")
        there = environment | {"RAY_ADDRESS": f"{host}:{port}"}
        code, output = await _python(*arguments, environment=there)
        assert code == 2, output
        assert "after 1 s: placement = colocated: 1 trainer ranks" in output
        assert f"need 2 CPUs, and do not fit into the cluster: {host} has 0 GPUs and 1 CPUs" in output
        ended = asyncio.ensure_future(node.ended())
        assert not (await asyncio.wait((ended,), timeout=1))[0]
        ended.cancel()


async def _python(program: str, *arguments: str, environment: dict[str, str]) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *arguments),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()
