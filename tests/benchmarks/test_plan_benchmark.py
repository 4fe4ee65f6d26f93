"""Fitted rates and simulated settings of benchmarks/plan.py."""

import numpy as np
import pytest

from benchmarks.engine_calibration import FittedRates, Timed, fitted
from benchmarks.plan import SETTINGS, simulate
from treepo.planning.simulation.virtual_clock import run_virtually


def test_the_fit_recovers_the_costs_behind_the_times() -> None:
    generator = np.random.default_rng(0)
    rows = np.column_stack([np.ones(9), generator.integers(1, 60, 9), generator.integers(20, 9000, 9)])
    costs = np.array([0.02, 0.0003, 1e-6])
    times = {
        tuple(row): [Timed(float(row @ costs) * noise, 0.0) for noise in (0.5, 1.0, 3.0)]
        for row in rows.tolist()
    }
    assert fitted(times, cpu=False) == pytest.approx(costs.tolist())  # the median has no noise


def test_no_cost_is_negative() -> None:
    times = {(1.0, float(n)): [Timed(0.01 - 1e-5 * n, 0.0)] for n in range(1, 9)}
    step, request = fitted(times, cpu=False)
    assert request == 0
    assert step == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_simulated(name: str) -> None:
    rates = FittedRates(0.01, 3e-4, 1e-6, 0.002, 0.02, 1e-3, 1e-4, 0.0)
    run = run_virtually(simulate(SETTINGS[name], rates, step=1))
    assert run.counts.decoded_tokens == run.tokens
    assert run.counts.retractions == 0  # the driver admits what the cache holds
    assert run.counts.busy_seconds < run.seconds
