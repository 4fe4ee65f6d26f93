"""Real Ray with GPUs that are only numbers: actors land where the plan says, and a refusal says why."""

import asyncio
import os
from typing import Any

import pytest

from tests.support.plan_configs import config
from treepo.config.engine import EngineConfig
from treepo.config.run import RunConfig
from treepo.errors import PlacementError

pytestmark = pytest.mark.slow


def layout(placement: str, ranks: int, engines: int, tensor: int) -> RunConfig:
    return config(
        placement=placement,
        trainer={"parallel": {"data": ranks}},
        engine={"count": engines, "tensor": tensor},
    )


def test_actors_land_as_planned() -> None:
    import ray

    from treepo.cluster.reservation import reserve, unreserved_engines

    @ray.remote
    class Witness:
        def gpus(self) -> list[str]:
            """The GPUs that Ray gives it, which must be those that a library would see."""
            given = [str(gpu) for gpu in ray.get_gpu_ids()]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            assert not given or given == visible
            return visible

        def environment(self, name: str) -> str | None:
            return os.environ.get(name)

    async def witnesses(options: Any) -> list[list[str]]:
        witness: Any = Witness
        actors = [witness.options(**of_actor).remote() for of_actor in options]
        return [await actor.gpus.remote() for actor in actors]

    async def witnesses_of_shares(options: Any) -> list[list[str]]:
        return [share for shares in options for share in await witnesses(shares)]

    async def scenario() -> None:
        shared = await reserve(layout("colocated", 2, 1, 2), 60)
        ranks = [device for (device,) in await witnesses(shared.ranks)]
        assert await witnesses_of_shares(shared.engine_options(ranks)) == [ranks], (
            "the engine gets the ranks' devices"
        )
        split = await reserve(layout("split", 1, 1, 2), 60)
        (own,) = await witnesses(split.ranks)
        (pair,) = await witnesses_of_shares(split.engine_options([]))
        witness: Any = Witness
        engine = witness.options(**split.engines[0][0]).remote()
        assert await engine.environment.remote("OMP_WAIT_POLICY") == "passive"
        assert sorted([*ranks, *own, *pair]) == ["0", "1", "2", "3", "4"]
        with pytest.raises(PlacementError, match="4 GPUs are needed and 1 are free in all"):
            await reserve(layout("split", 2, 1, 2), 0.5)
        with pytest.raises(PlacementError, match="need 8 GPUs"):
            await reserve(layout("split", 4, 2, 2), 60)
        with pytest.raises(PlacementError, match="3 engines of 4"):
            unreserved_engines(EngineConfig.model_validate({"count": 3, "tensor": 4}))

    ray.init(address="local", num_cpus=16, num_gpus=6, include_dashboard=False, log_to_driver=False)
    try:
        asyncio.run(scenario())
    finally:
        ray.shutdown()
