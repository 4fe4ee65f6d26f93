"""An engine's node leaves a real Ray cluster, and another takes its place; the engine is a plain actor."""

import os
import subprocess
import sys

import pytest

from treepo.cluster.ray_node import new_secrets

pytestmark = pytest.mark.slow

# In a process of its own: Ray reads a cluster's secrets when it is imported.
SCENARIO = """
import asyncio, os
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from treepo.cluster.engine_devices import EngineDevices
from treepo.cluster.ray_node import NodeResources, free_ports, ray_head, ray_worker
from treepo.errors import PlacementError

@ray.remote
class Witness:
    def node(self):
        return ray.get_runtime_context().get_node_id()

async def scenario():
    host, (port, dashboard_port) = ray.util.get_node_ip_address(), free_ports(2)
    address, secrets = f"{host}:{port}", {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")}
    one = NodeResources(cpus=1)

    async def join():
        # A node that joins before Ray's head listens ends.
        while True:
            await asyncio.sleep(1)
            try:
                await asyncio.to_thread(ray.init, address=address, log_to_driver=False)
                return
            except ConnectionError:
                pass

    async def node_with_cpu():
        while True:
            for node in ray.nodes():
                if node["Alive"] and node["Resources"].get("CPU"):
                    return node["NodeID"]
            await asyncio.sleep(0.2)

    async with ray_head(host, port, dashboard_port, NodeResources(cpus=0), secrets):
        await join()
        async with ray_worker(host, address, one, secrets):
            node = await node_with_cpu()
            # As a run reserves: the bundle goes to no other node when this one is lost.
            group = placement_group([{"CPU": 1.0}], bundle_label_selector=[{"ray.io/node-id": node}])
            await group.ready()
            options = {"num_cpus": 1, "num_gpus": 0}
            reserved = options | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
            devices = EngineDevices([[reserved]], may_move=True, seconds=120)
            stays = EngineDevices([[reserved]], may_move=False, seconds=0.1)
            await devices.find(0)
            witness = Witness.options(**devices.options[0][0]).remote()
            first = await witness.node.remote()
        await devices.lost(0)
        try:
            await EngineDevices([[options]], may_move=True, seconds=0.1).find(0)
        except PlacementError as error:
            print(error)
        finding = asyncio.create_task(devices.find(0))
        async with ray_worker(host, address, one, secrets):
            await finding
            witness = Witness.options(**devices.options[0][0]).remote()
            print("moved:", await witness.node.remote() != first)
            await devices.find(0)
            try:
                await stays.find(0)
            except PlacementError as error:
                print("stays:", error)
        ray.shutdown()

asyncio.run(scenario())
"""


def test_an_engine_moves_to_a_node_that_replaces_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCENARIO],
        env=os.environ | new_secrets({}),
        capture_output=True,
        text=True,
        check=False,
    )
    none = "no node has had free devices for it within 0.1 s (engine.rejoin_seconds)"
    stays = "its node has left the cluster, and it cannot leave the trainer's devices"
    assert result.stdout.splitlines() == [none, "moved: True", f"stays: {stays}"], result.stderr
