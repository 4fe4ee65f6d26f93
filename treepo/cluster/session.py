"""Starts Ray, the engines and the trainer for one command, and ends them with it."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from treepo.cluster.actor_death import without_guesses
from treepo.cluster.engine_devices import EngineDevices
from treepo.cluster.engine_pool import EnginePool
from treepo.cluster.nodes import cluster_nodes
from treepo.cluster.ray_address import check_cluster, named_cluster
from treepo.cluster.ray_engine import EngineLauncher, RayEngine, ServingConfig
from treepo.cluster.ray_logs import kept_after_failure
from treepo.cluster.ray_node import RAY_SETTINGS, SOCKET_ROOM, new_token, ray_folder
from treepo.cluster.ray_watch import keeping_signal_handlers, shut_down_ray, while_ray_lives
from treepo.cluster.reservation import Reservation, reserve, unreserved_engines
from treepo.cluster.trainer_group import TrainerGroup
from treepo.cluster.training_engine_pool import TrainingEnginePool
from treepo.config.engine import EngineConfig
from treepo.config.evaluate import EvalConfig
from treepo.config.rollout import RolloutConfig
from treepo.config.run import ModelConfig, RunConfig
from treepo.data.temporary_folder import temporary_folder
from treepo.errors import ClusterError, LostTrainerError, PlacementError, one_line
from treepo.rollout.stopping import StopRule

_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
_log = logging.getLogger(__name__)


@asynccontextmanager
async def engine_session(config: RolloutConfig, stop_rule: StopRule) -> AsyncIterator[EnginePool[RayEngine]]:
    """Run Ray and engines that serve the model folder's weights, while the body runs."""
    async with watched_ray(_engine_actors(config.engine), config.out):
        serving = _Serving(_on_cluster(config.model), config.engine, config.seed)
        async with _engines(serving, stop_rule) as pool:
            yield pool


@asynccontextmanager
async def evaluation_session(config: EvalConfig, stop_rule: StopRule) -> AsyncIterator[EnginePool[RayEngine]]:
    """As `engine_session`, for an evaluation: its number of engines may depend on the cluster's GPUs."""
    assert config.model.path is not None, "a server's URL needs no engines"
    async with watched_ray(_engine_actors(config.engine.on(0)), config.out):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        model = _on_cluster(ModelConfig(path=config.model.path, dtype=config.model.dtype))
        async with _engines(_Serving(model, config.engine.on(gpus), config.seed), stop_rule) as pool:
            yield pool


@asynccontextmanager
async def training_session(
    config: RunConfig, stop_rule: StopRule
) -> AsyncIterator[tuple[TrainingEnginePool[RayEngine], TrainerGroup]]:
    """Run Ray, engines and trainer while the body runs. Raises PlacementError if the cluster cannot hold
    them.

    Engines and trainer start at the same time, unless they share devices: then the trainer starts first,
    computes once, and gives back what it can, and the engines' caches take the memory that it leaves.
    """
    async with watched_ray(_engine_actors(config.engine) + config.trainer.parallel.ranks, config.out):
        config = config.model_copy(update={"model": _on_cluster(config.model)})
        reservation = await reserve(config, config.engine.start_seconds)
        _check_transport(config, reservation)
        trainer = TrainerGroup(config, reservation.ranks, reservation.rank_nodes)
        shared = reservation.shares_devices
        if shared:
            await trainer.ready()
            await trainer.offload(weights=True)
        devices = EngineDevices(
            reservation.engine_options(await trainer.devices() if shared else ()),
            may_move=not shared and config.weights.transport != "colocated",
            seconds=config.engine.rejoin_seconds,
        )
        launcher = EngineLauncher(
            config,
            stop_rule,
            devices,
            shared,
            config.paths_at_once,
            config.samples_routes,
            config.served_lora,
        )
        goes_on = config.loop.mode == "async"
        pool = TrainingEnginePool(launcher, config.engine, trainer, shared, sampling_goes_on=goes_on)
        try:
            if shared:
                await pool.ready()
            else:
                await asyncio.gather(pool.ready(), _ready_or_lost(trainer))
            yield pool, trainer
        finally:
            await pool.close()


def _engine_actors(engine: EngineConfig) -> int:
    """Actors of all engines on one machine."""
    return engine.count * (engine.nodes or 1)


async def _ready_or_lost(trainer: TrainerGroup) -> None:
    """Make the trainer ready. If it is lost meanwhile, its next call says so, and it is started again."""
    try:
        await trainer.ready()
    except LostTrainerError as error:
        _log.warning("%s, before it was ready", error)


def _on_cluster(model: ModelConfig) -> ModelConfig:
    """The model with its dtype decided for the cluster's devices. Raises ConfigError."""
    gpus = any(node.gpus for node in cluster_nodes())
    decided = model.on(gpus=gpus)
    if model.dtype == "auto":
        _log.info("model.dtype = auto: %s, on %s", decided.dtype, "GPUs" if gpus else "CPUs")
    return decided


@contextmanager
def ray_session(actors: int, out: Path | None = None) -> Iterator[None]:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine and end it with the body.

    actors: number of engines' shares and trainer ranks. A cluster started here has a CPU slot for each, so
    that a small machine can hold a layout of several ranks. On an existing cluster the layout must fit its
    CPUs. out: the folder that keeps Ray's logs if the body fails. Raises ClusterError if Ray does not start,
    or the named cluster does not answer.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Compiled Python modules halve the start of every worker, and Ray passes this environment to them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    ray._private.worker.print_to_stdstream = _log_message  # type: ignore[reportAttributeAccessIssue]
    named = named_cluster()
    with temporary_folder(SOCKET_ROOM if named is None else 0) as folder:
        try:
            with keeping_signal_handlers():
                if named is None:
                    _start_here(actors, folder)
                else:
                    ray.init(check_cluster(named), **_QUIET)
        except (RuntimeError, OSError, AuthenticationError) as error:  # as of a cluster of another version
            joining = f"RAY_ADDRESS={named}: Ray cannot join the cluster"
            what = "Ray does not start" if named is None else joining
            raise ClusterError(f"{what}: {one_line(error)}") from None
        with kept_after_failure(out):
            try:
                yield
            finally:
                shut_down_ray()


def _start_here(actors: int, folder: Path) -> None:
    """Start a cluster that nobody else reaches: it listens on loopback, and asks for a token."""
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray asks for a token by itself; its own is a file in the home folder that others may read. One for
        # the life of this process, because Ray reads it once.
        os.environ.setdefault("RAY_AUTH_TOKEN", new_token())
    with _on_loopback():
        ray.init(
            address="local",
            num_cpus=max(actors, os.cpu_count() or 1),
            include_dashboard=False,
            _temp_dir=str(ray_folder(folder)),
            **_QUIET,
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make Ray give this node the address 127.0.0.1: its servers then listen there only.

    Ray replaces a loopback address that it is given by another one, except on systems on which it knows no
    clusters.
    """
    constants: Any = ray._private.ray_constants  # type: ignore[reportAttributeAccessIssue]
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@asynccontextmanager
async def watched_ray(actors: int, out: Path) -> AsyncIterator[None]:
    """As `ray_session`; raises ClusterError in place of the body if Ray dies meanwhile."""
    with ray_session(actors, out):
        joined = None if named_cluster() is None else ray.get_runtime_context().gcs_address
        async with while_ray_lives(joined):
            yield


def _log_message(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Write Ray's messages about dead processes to the log: by default it prints them, with its guesses."""
    del ignore_prefix
    for line in data["lines"]:
        _log.info("Ray: %s", without_guesses(line))


@dataclass(frozen=True, slots=True)
class _Serving:
    """Implements `ServingConfig`."""

    model: ModelConfig
    engine: EngineConfig
    seed: int


@asynccontextmanager
async def _engines(config: ServingConfig, stop_rule: StopRule) -> AsyncIterator[EnginePool[RayEngine]]:
    options, seconds = unreserved_engines(config.engine), config.engine.rejoin_seconds
    devices = EngineDevices(options, may_move=True, seconds=seconds)
    launcher = EngineLauncher(config, stop_rule, devices, shares_devices=False)
    pool = EnginePool(launcher, config.engine)
    try:
        await pool.ready()
        yield pool
    finally:
        await pool.close()


def _check_transport(config: RunConfig, reservation: Reservation) -> None:
    """Raise PlacementError if `weights.transport` cannot work where the engines were placed."""
    shared = reservation.shares_devices
    if config.weights.transport == "colocated" and not reservation.one_machine:
        raise PlacementError(
            "weights.transport = colocated: some engine is on another machine than trainer rank 0, which "
            f"sends; {'host_broadcast' if shared else 'broadcast, host_broadcast'} and disk are allowed"
        )
    if config.weights.transport == "broadcast" and shared:
        raise PlacementError(
            "placement = colocated with weights.transport = broadcast: NCCL takes one process a GPU; "
            "colocated, host_broadcast and disk are allowed"
        )
