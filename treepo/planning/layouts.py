"""Other layouts of the same run, nearest first: what to try if the configured one does not fit.

A neighbour keeps the model, the batch and the lengths. It changes tensor, context, pipeline and expert
parallelism, recomputation, pack size, the engines' tensor parallelism and share of memory, and a transport
that cannot work, on the same devices or on two or four times as many. Data parallelism and the number of
engines follow.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import log2
from operator import attrgetter
from typing import Any, get_args

from pydantic import ValidationError

from megatron_bridge.architecture import Architecture, check_layout
from treepo.config.run import RunConfig
from treepo.config.weights import WeightsConfig
from treepo.errors import ConfigError
from treepo.planning.nodes import footprint, transport_problem

_RECOMPUTE = ("none", "selective", "full")
_FRACTIONS = (0.6, 0.7, 0.8, 0.9)
_SMALL_STEP = 0.5  # another recomputation, pack size or memory share is less than a doubling of parallelism
_MORE_DEVICES = 3.0  # a doubling of the devices is the last resort


@dataclass(frozen=True, slots=True)
class Neighbour:
    """changes: dotted keys and their new values. derived: keys that follow from them."""

    config: RunConfig
    changes: Mapping[str, Any]
    derived: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """Both, as overrides on the command line."""
        return [f"{key}={value}" for key, value in {**self.changes, **self.derived}.items()]

    def goes_beyond(self, other: "Neighbour") -> bool:
        """Whether everything that `other` changes is changed here too."""
        return self.changes.keys() >= other.changes.keys()


def neighbours(config: RunConfig, architecture: Architecture) -> Iterator[Neighbour]:
    """Valid layouts by their distance from `config`, which is left out."""
    points = sorted(_points(config, architecture), key=lambda point: point[0])
    for _, point in points:
        neighbour = _neighbour(config, architecture, point)
        if neighbour is not None and neighbour.changes:
            yield neighbour


def _points(config: RunConfig, architecture: Architecture) -> Iterator[tuple[float, dict[str, Any]]]:
    """Distance and settings of every combination, valid or not."""
    parallel, engine = config.trainer.parallel, config.engine
    fraction = engine.memory_fraction
    shortest_pack = config.data.max_prompt_tokens + config.sampling.max_response_tokens
    in_a_node = _powers_of_two(config.plan.devices_per_node)
    choices: dict[str, tuple[Any, Iterable[Any]]] = {
        "devices": (1, (1, 2, 4)),
        "trainer.parallel.context": (parallel.context, in_a_node),
        "trainer.parallel.tensor": (parallel.tensor, in_a_node),
        "trainer.parallel.pipeline": (parallel.pipeline, _powers_of_two(architecture.dimensions.layers)),
        "trainer.parallel.expert": (parallel.expert, _powers_of_two(architecture.dimensions.experts or 1)),
        "trainer.recompute": (config.trainer.recompute, _RECOMPUTE),
        "trainer.max_tokens_per_pack": (config.trainer.max_tokens_per_pack, (shortest_pack,)),
        "engine.tensor": (engine.tensor, [*in_a_node, 2 * in_a_node[-1]]),
        "weights.transport": (config.weights.transport, _other_transports(config)),
        # Only if it is configured: SGLang's own choice already follows the device.
        "engine.memory_fraction": (fraction, [more for more in _FRACTIONS if fraction and more > fraction]),
    }
    values = [sorted({now, *others}, key=str) for now, others in choices.values()]
    for combination in itertools.product(*values):
        point = dict(zip(choices, combination, strict=True))
        distance = sum(_distance(key, choices[key][0], value) for key, value in point.items())
        yield distance, point


def _other_transports(config: RunConfig) -> list[str]:
    """Transports to try, if the configured one cannot reach the engines."""
    if transport_problem(config, footprint(config)) is None:
        return []
    transports = get_args(WeightsConfig.model_fields["transport"].annotation)
    return [transport for transport in transports if transport != config.weights.transport]


def _distance(key: str, now: Any, then: Any) -> float:
    if now == then:
        return 0.0
    if key == "trainer.recompute":
        return _SMALL_STEP * abs(_RECOMPUTE.index(now) - _RECOMPUTE.index(then))
    if key in ("trainer.max_tokens_per_pack", "weights.transport"):
        return _SMALL_STEP
    if key == "engine.memory_fraction":
        return _SMALL_STEP + abs(float(then) - float(now))
    return abs(log2(float(then) / float(now))) * (_MORE_DEVICES if key == "devices" else 1.0)


def _neighbour(config: RunConfig, architecture: Architecture, point: Mapping[str, Any]) -> Neighbour | None:
    """None if the settings do not divide the model, the batch or the devices."""
    parallel, engine, factor = config.trainer.parallel, config.engine, point["devices"]
    tensor, pipeline = point["trainer.parallel.tensor"], point["trainer.parallel.pipeline"]
    of_replica = tensor * pipeline * point["trainer.parallel.context"]
    ranks, engine_devices = parallel.ranks * factor, engine.count * engine.ranks * factor
    of_engine = point["engine.tensor"] * engine.pipeline
    if ranks % of_replica or engine_devices % of_engine:
        return None
    settings = {key: value for key, value in point.items() if key != "devices"}
    data = {"trainer.parallel.data": ranks // of_replica}
    derived = {"engine.count": engine_devices // of_engine}
    if factor > 1:  # the purpose of the further devices
        settings |= data
    else:
        derived |= data
    if pipeline == 1:
        derived["trainer.parallel.virtual_pipeline"] = 1
    values = config.model_dump()
    for key, value in {**settings, **derived}.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    try:
        other = RunConfig.model_validate(values)
        check_layout(architecture, other.trainer.parallel)
    except (ValidationError, ConfigError):
        return None
    return Neighbour(other, _changed(config, settings), _changed(config, derived))


def _changed(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if attrgetter(key)(config) != value}


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
