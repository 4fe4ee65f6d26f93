"""Weight updates of the real SGLang engine: a transaction that is seen whole or not at all."""

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from treepo.errors import EngineError

if TYPE_CHECKING:
    from real_engine import RealEngine

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # as in test_engine.py
CONTEXT = np.arange(20, 50, dtype=np.int32)


def assert_agrees(real: "RealEngine") -> None:
    """The engine serves the reference's weights, under its own version."""
    output = real.generate(CONTEXT)
    assert output.version == real.engine.version
    np.testing.assert_allclose(output.log_probs, real.log_probs(CONTEXT, output.tokens, 1.0), atol=TOLERANCE)


def test_an_update_is_visible_and_old_prefixes_are_not(real_engine: "RealEngine") -> None:
    from real_engine import perturbed

    real_engine.generate(CONTEXT)
    assert real_engine.generate(CONTEXT).cached_tokens == len(CONTEXT) - 1
    before = real_engine.run(real_engine.engine.score(CONTEXT))
    version = real_engine.update(perturbed(real_engine.reference))
    assert version == real_engine.engine.version
    after = real_engine.generate(CONTEXT)
    assert after.cached_tokens == 0
    assert after.version == version
    assert np.abs(real_engine.run(real_engine.engine.score(CONTEXT)) - before).max() > 0.01
    assert_agrees(real_engine)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "repeated"])
def test_a_commit_of_other_tensors_than_arrived_refuses_to_serve(
    real_engine: "RealEngine", fault: str
) -> None:
    from real_engine import buckets, perturbed

    weights = perturbed(real_engine.reference)
    names = list(weights)
    version = real_engine.engine.version

    async def update() -> None:
        await real_engine.engine.begin(version + 1)
        for bucket in buckets(weights):
            await real_engine.engine.load(bucket)
        if fault == "repeated":
            await real_engine.engine.load(next(buckets(weights)))
        expected = {"missing": [*names, "model.absent"], "unexpected": names[1:], "repeated": names}[fault]
        await real_engine.engine.commit(expected)

    with pytest.raises(EngineError, match=f"{fault}: .*{'absent' if fault == 'missing' else 'model'}"):
        real_engine.run(update())
    with pytest.raises(EngineError, match="refuses to serve"):
        real_engine.generate(CONTEXT)
    assert real_engine.engine.version == version

    real_engine.update(perturbed(real_engine.reference))
    assert_agrees(real_engine)


@pytest.mark.parametrize("fault", ["no tensor", "shape", "bytes"])
def test_a_bucket_that_does_not_fit_the_model_refuses_to_serve(real_engine: "RealEngine", fault: str) -> None:
    from dataclasses import replace

    from real_engine import buckets, perturbed

    good = next(buckets(perturbed(real_engine.reference)))
    bad = {
        "no tensor": replace(good, names=("model.nonsense", *good.names[1:])),
        "shape": replace(good, shapes=((3, 5), *good.shapes[1:])),
        "bytes": replace(good, data=good.data[:-4]),
    }[fault]

    async def update() -> None:
        await real_engine.engine.begin(real_engine.engine.version + 1)
        await real_engine.engine.load(bad)

    with pytest.raises(EngineError, match=fault):
        real_engine.run(update())
    with pytest.raises(EngineError, match="refuses to serve"):
        real_engine.generate(CONTEXT)
    real_engine.update(perturbed(real_engine.reference))
    assert_agrees(real_engine)


def test_an_update_waits_for_running_requests_and_makes_later_ones_wait(real_engine: "RealEngine") -> None:
    from real_engine import buckets, perturbed, request

    engine = real_engine.engine
    old = engine.version
    weights = {name: tensor.clone() for name, tensor in perturbed(real_engine.reference).items()}

    async def scenario() -> tuple[int, int]:
        asked = request(CONTEXT, max_tokens=100)
        running = [asyncio.ensure_future(engine.generate(asked)) for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # a task has started after one turn of the loop, the request after another
        await engine.begin(old + 1)
        assert all(task.done() for task in running)
        late = asyncio.ensure_future(engine.generate(request(CONTEXT)))
        for bucket in buckets(weights):
            await engine.load(bucket)
        assert not late.done()
        await engine.commit(list(weights))
        assert {task.result().version for task in running} == {old}
        return (await late).version, old

    version, old = real_engine.run(scenario())
    real_engine.reference.load_state_dict(weights)
    assert version == old + 1
    assert_agrees(real_engine)


def test_an_update_ends_a_checked_request_at_its_next_boundary(real_engine: "RealEngine") -> None:
    """So that the rest of the path is sampled by the new weights; what came before is of the old ones."""
    from real_engine import perturbed, request

    engine = real_engine.engine
    weights = perturbed(real_engine.reference)
    real_engine.stop_rule.holds = lambda _: False

    async def scenario() -> None:
        asked = [request(CONTEXT, max_tokens=900, check_every=16, seed=seed) for seed in range(30)]
        running = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await asyncio.sleep(0.2)
        old = engine.version
        await engine.begin(old + 1)
        outputs = [task.result() for task in running]
        assert {output.version for output in outputs} == {old}
        stopped = [output for output in outputs if output.finish == "length"]
        assert stopped
        assert all(len(output.tokens) % 16 == 0 and len(output.tokens) < 900 for output in stopped)

    real_engine.run(scenario())
    real_engine.update(weights)
    assert_agrees(real_engine)


def test_an_update_that_was_left_open_is_begun_anew(real_engine: "RealEngine") -> None:
    from real_engine import buckets, perturbed

    weights = perturbed(real_engine.reference)

    async def abandon() -> None:
        await real_engine.engine.begin(real_engine.engine.version + 1)
        await real_engine.engine.load(next(buckets(weights)))

    real_engine.run(abandon())
    real_engine.update(weights)
    assert_agrees(real_engine)


def test_no_commit_and_no_load_without_begin(real_engine: "RealEngine") -> None:
    from real_engine import buckets

    with pytest.raises(EngineError, match="begun"):
        real_engine.run(real_engine.engine.commit([]))
    with pytest.raises(EngineError, match="begun"):
        real_engine.run(real_engine.engine.load(next(buckets({"x": torch.zeros(3)}, count=1))))
    assert_agrees(real_engine)
