"""What a reservation that moves leaves behind, on a fake Ray."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from treepo.cluster import engine_devices, reservation
from treepo.cluster.engine_devices import EngineDevices
from treepo.cluster.reservation import reserve_again
from treepo.errors import PlacementError
from treepo.planning.simulation.virtual_clock import run_virtually


class Group:
    def __init__(self, ray: "Ray", bundles: list[Any]) -> None:
        self.id, self.bundle_count, self.node, self._ray = object(), len(bundles), ray.node, ray

    async def ready(self) -> None:
        self._ray.calls.append("wait")
        await asyncio.sleep(0)


class Ray:
    """Notes when groups are waited for and removed; a new group is on `node`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.node, self.living, self.calls = "a", {"a"}, []
        for module in (engine_devices, reservation):
            monkeypatch.setattr(module, "placement_group", lambda bundles: Group(self, bundles))
            monkeypatch.setattr(module, "remove_placement_group", lambda _: self.calls.append("remove"))
            monkeypatch.setattr(module, "living_nodes", lambda: self.living)
            monkeypatch.setattr(module, "placement_group_table", self._table)
            monkeypatch.setattr(module, "PlacementGroupSchedulingStrategy", strategy)
        monkeypatch.setattr(engine_devices, "_address", str)

    def _table(self, group: Group) -> dict[str, Any]:
        return {"bundles_to_node_id": dict.fromkeys(range(group.bundle_count), group.node)}


def strategy(group: Group, index: int) -> Any:
    return SimpleNamespace(placement_group=group, placement_group_bundle_index=index)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


def test_an_engine_gives_up_its_earlier_devices_before_it_waits(
    ray: Ray, caplog: pytest.LogCaptureFixture
) -> None:
    devices = EngineDevices([[{"num_cpus": 1, "num_gpus": 1}]], may_move=True, seconds=9)
    asyncio.run(devices.find(0))
    ray.node, ray.living = "b", {"b"}
    asyncio.run(devices.find(0))
    assert ray.calls == ["wait", "remove", "wait"]
    assert [line for line in caplog.messages if "moves" in line] == [
        "engine 0 moves to a",
        "engine 0 moves to b",
    ]


def test_only_the_shares_of_lost_nodes_move_and_they_move_together(ray: Ray) -> None:
    """An engine of three shares, of which the run has reserved one each on a, b and c."""
    here = {"num_cpus": 1, "num_gpus": 8}
    options = []
    for ray.node in ("a", "b", "c"):
        options.append(here | {"scheduling_strategy": strategy(Group(ray, [here]), 0)})
    devices = EngineDevices([options], may_move=True, seconds=9)
    ray.living = {"a", "b", "c"}
    asyncio.run(devices.find(0))
    assert (ray.calls, devices.options) == ([], [options])

    def groups() -> list[Any]:
        return [share["scheduling_strategy"].placement_group for share in devices.options[0]]

    reserved = groups()
    ray.node, ray.living = "d", {"b", "d"}
    asyncio.run(devices.find(0))
    moved = groups()
    assert moved[1] is reserved[1]
    assert moved[0] is moved[2] is not reserved[0]
    assert moved[0].bundle_count == 2
    assert ray.calls == ["wait"]
    ray.node, ray.living = "e", {"d", "e"}  # the share that had stayed is lost too: all move
    asyncio.run(devices.find(0))
    assert len(set(groups())) == 1
    assert groups()[0].bundle_count == 3
    assert ray.calls == ["wait", "remove", "wait"]
    stays = EngineDevices([options], may_move=False, seconds=9)
    with pytest.raises(PlacementError, match="cannot leave the trainer's devices"):
        asyncio.run(stays.find(0))


@pytest.mark.parametrize(("bundles", "calls"), [(1, ["remove", "wait"]), (2, ["wait"])])
def test_a_trainers_reservation_without_a_living_node_is_removed(
    ray: Ray, bundles: int, calls: list[str]
) -> None:
    """With another bundle, an engine or another rank may still be in it."""
    group = Group(ray, [{}] * bundles)
    ray.node, ray.living = "b", {"b"}
    options = [{"num_gpus": 1, "scheduling_strategy": strategy(group, 0)}]
    _, nodes = run_virtually(reserve_again(options, ["a"], 9))
    assert nodes == ["b"]
    assert ray.calls == calls


def test_the_ranks_of_each_lost_node_get_a_group_of_their_own(ray: Ray) -> None:
    """So a group that loses its node later holds nothing that still lives."""
    group = Group(ray, [{}] * 2)
    ray.node, ray.living = "b", {"b"}
    options = [{"num_gpus": 1, "scheduling_strategy": strategy(group, rank // 2)} for rank in range(4)]
    moved, _ = run_virtually(reserve_again(options, ["a", "a", "c", "c"], 9))
    groups = [option["scheduling_strategy"].placement_group for option in moved]
    assert groups[0] is groups[1]
    assert groups[2] is groups[3]
    assert groups[0] is not groups[2]
    assert all(one.bundle_count == 1 for one in groups)
