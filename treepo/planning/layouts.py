"""Other layouts of the same run, the nearest first: what to try where the one asked for does not fit.

A neighbour has the same model, batch and lengths. It differs in tensor, pipeline and expert parallelism,
recomputation, pack size, the engines' tensor parallelism and their share of memory, on the same devices or on
two or four times as many; data parallelism and the number of engines follow.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import log2
from typing import Any, get_args

from pydantic import ValidationError

from megatron_bridge.architecture import Architecture, check_layout
from treepo.config.run import RunConfig
from treepo.config.weights import WeightsConfig
from treepo.errors import ConfigError
from treepo.planning.places import places
from treepo.planning.update_problem import update_problem

_RECOMPUTE = ("none", "selective", "full")
_FRACTIONS = (0.6, 0.7, 0.8, 0.9)
_SMALL_STEP = 0.5  # another recomputation, pack size or memory share is less than a doubling of parallelism
_MORE_DEVICES = 3.0  # a doubling of the devices: only where nothing fits on those that there are


@dataclass(frozen=True, slots=True)
class Neighbour:
    """changes: dotted keys and their new values; derived: those that follow from them."""

    config: RunConfig
    changes: Mapping[str, Any]
    derived: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """As they are written on the command line."""
        return [f"{key}={value}" for key, value in {**self.changes, **self.derived}.items()]

    def goes_beyond(self, other: "Neighbour") -> bool:
        """Whether all that `other` changes is changed here too."""
        return self.changes.keys() >= other.changes.keys()


def neighbours(config: RunConfig, architecture: Architecture) -> Iterator[Neighbour]:
    """Valid ones in the order of their distance, `config` itself left out."""
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
    on_a_node = _powers_of_two(config.plan.devices_per_node)
    choices: dict[str, tuple[Any, Iterable[Any]]] = {
        "devices": (1, (1, 2, 4)),
        "trainer.parallel.tensor": (parallel.tensor, on_a_node),
        "trainer.parallel.pipeline": (parallel.pipeline, _powers_of_two(architecture.dimensions.layers)),
        "trainer.parallel.expert": (parallel.expert, _powers_of_two(architecture.dimensions.experts or 1)),
        "trainer.recompute": (config.trainer.recompute, _RECOMPUTE),
        "trainer.max_tokens_per_pack": (config.trainer.max_tokens_per_pack, (shortest_pack,)),
        "engine.tensor": (engine.tensor, on_a_node),
        # Written out where it was: SGLang's own choice follows the device.
        "weights.transport": (config.weights.transport, _open_ways(config)),
        "engine.memory_fraction": (fraction, [more for more in _FRACTIONS if fraction and more > fraction]),
    }
    values = [sorted({now, *others}, key=str) for now, others in choices.values()]
    for combination in itertools.product(*values):
        point = dict(zip(choices, combination, strict=True))
        distance = sum(_distance(key, choices[key][0], value) for key, value in point.items())
        yield distance, point


def _open_ways(config: RunConfig) -> list[str]:
    """Other transports, where that of the configuration cannot be used."""
    if update_problem(config, places(config)) is None:
        return []
    ways = get_args(WeightsConfig.model_fields["transport"].annotation)
    return [way for way in ways if way != config.weights.transport]


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
    """None where the settings do not divide the model, the batch or the devices."""
    parallel, engine, factor = config.trainer.parallel, config.engine, point["devices"]
    tensor, pipeline = point["trainer.parallel.tensor"], point["trainer.parallel.pipeline"]
    ranks, engine_devices = parallel.ranks * factor, engine.count * engine.tensor * factor
    if ranks % (tensor * pipeline) or engine_devices % point["engine.tensor"]:
        return None
    settings = {key: value for key, value in point.items() if key != "devices"}
    data = {"trainer.parallel.data": ranks // (tensor * pipeline)}
    follow = {"engine.count": engine_devices // point["engine.tensor"]}
    if factor > 1:  # what the further devices are for
        settings |= data
    else:
        follow |= data
    if pipeline == 1:
        follow["trainer.parallel.virtual_pipeline"] = 1
    values = config.model_dump()
    for key, value in {**settings, **follow}.items():
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
    return Neighbour(other, _changed(config, settings), _changed(config, follow))


def _changed(config: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if _value(config, key) != value}


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
