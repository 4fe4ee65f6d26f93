"""The soak finds what grows, and is not deceived by noise, by a warm-up or by what it did not measure."""

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks import soak

STEPS = 300
NOISE = np.random.default_rng(0).normal(size=STEPS + 1)


def line(values: np.ndarray) -> dict[str, object]:
    series: soak.Series = {("driver", "MiB"): [(step, float(value)) for step, value in enumerate(values)]}
    (found,) = soak.lines(series, STEPS, percent=2.0)
    return found


def test_a_leak_is_found_below_the_noise_of_a_sample() -> None:
    """A tenth of a MiB a step, with a noise of one MiB."""
    found = line(500 + 0.1 * np.arange(STEPS + 1) + NOISE)
    assert not found["flat"]
    assert found["slope_per_100_steps"] == pytest.approx(10, abs=1)


def test_noise_alone_is_flat() -> None:
    assert line(500 + NOISE)["flat"]
    assert line(2 + NOISE)["flat"], "also if it is as large as the mean"


def test_what_shrinks_or_grows_only_at_the_start_is_flat() -> None:
    steps = np.arange(STEPS + 1)
    assert line(500 - 0.1 * steps + NOISE)["flat"]
    assert line(500 + 100 * np.minimum(steps, 30) + NOISE)["flat"]


def test_memory_that_falls_at_every_checkpoint_is_flat_and_hides_no_leak() -> None:
    """A checkpoint every ten steps; the last sample of the run is high."""
    steps = np.arange(STEPS + 1)
    sawtooth = 600 + 45.0 * ((steps + 3) % 10)
    assert line(sawtooth)["flat"]
    assert not line(sawtooth + 0.1 * steps)["flat"]


def test_a_series_of_a_few_samples_has_no_slope() -> None:
    assert soak.Slope.of([(1, 5.0), (2, 7.0)]) == soak.Slope(6.0, 0.0, 0.0, 0.0)
    assert soak.Slope.of([]).flat(1.0)


def outcome_of(samples: Sequence[tuple[float, dict[tuple[str, str], float]]]) -> dict[str, object]:
    return soak.verdict(list(soak.lines(soak.filled(samples), STEPS, percent=2.0)))


def test_what_was_not_measured_is_not_flat() -> None:
    key, objects = ("driver", "MiB"), ("ray", "objects")
    measured = outcome_of([(step, {key: 500.0, objects: 7.0}) for step in range(STEPS)])
    assert measured == {"flat": True, "growing": [], "unmeasured": []}
    assert outcome_of([(step, {key: 500.0}) for step in range(STEPS)])["unmeasured"] == ["ray: objects"]
    few = outcome_of([(step, {key: 500.0, objects: 7.0}) for step in range(290, 292)])
    assert few == {"flat": False, "growing": [], "unmeasured": ["driver: MiB", "ray: objects"]}


def test_a_process_that_is_seen_once_is_measured_and_flat() -> None:
    rest = {("ray", "objects"): 7.0}
    for seen in (100, STEPS - 1):
        once = [(step, rest | ({("other", "MiB"): 5.0} if step == seen else {})) for step in range(STEPS)]
        assert outcome_of(once)["flat"]
