"""Weight syncs of the real SGLang engine: a transaction that takes effect as a whole or not at all."""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from treepo.errors import EngineError, TransportError
from treepo.protocols import GenerateOutput

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # as in test_engine.py
CONTEXT = np.arange(20, 50, dtype=np.int32)


def assert_agrees(real: "RealEngine") -> None:
    """The engine serves the reference's weights, under its own version."""
    output = real.generate(CONTEXT)
    assert output.version == real.engine.version
    np.testing.assert_allclose(output.log_probs, real.log_probs(CONTEXT, output.tokens, 1.0), atol=TOLERANCE)


def test_an_update_is_visible_and_old_prefixes_are_not(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import perturbed

    real_engine.generate(CONTEXT)
    assert real_engine.generate(CONTEXT).cached_tokens == len(CONTEXT) - 1
    before = real_engine.run(real_engine.engine.log_probs(CONTEXT))
    version = real_engine.update(perturbed(real_engine.reference))
    assert version == real_engine.engine.version
    after = real_engine.generate(CONTEXT)
    assert after.cached_tokens == 0
    assert after.version == version
    assert np.abs(real_engine.run(real_engine.engine.log_probs(CONTEXT)) - before).max() > 0.01
    assert_agrees(real_engine)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "repeated", "shape"])
def test_an_update_that_does_not_fit_the_model_is_refused_before_it_begins(
    real_engine: "RealEngine", fault: str
) -> None:
    """The engine keeps serving its weights: nothing was overwritten."""
    from tests.support.real_engine import manifest, perturbed

    good = manifest(perturbed(real_engine.reference))
    bad = {
        "missing": good[1:],
        "unexpected": (*good, replace(good[0], name="model.nonsense")),
        "repeated": (*good, good[0]),
        "shape": (replace(good[0], shape=(3, 5)), *good[1:]),
    }[fault]
    with pytest.raises(EngineError, match=fault):
        real_engine.run(real_engine.engine.begin(real_engine.engine.version + 1, bad))
    assert_agrees(real_engine)


@pytest.mark.parametrize("fault", ["checksum", "not as announced", "missing", "repeated"])
def test_weights_that_did_not_arrive_complete_are_not_served(real_engine: "RealEngine", fault: str) -> None:
    from tests.support.real_engine import buckets, manifest, perturbed
    from tests.support.weight_sinks import CPU
    from treepo.weight_sync.colocated import ColocatedSender

    engine, weights = real_engine.engine, perturbed(real_engine.reference)
    version = engine.version

    async def update() -> None:
        await engine.begin(version + 1, manifest(weights))
        sender = ColocatedSender(CPU)
        await engine.join(sender.addresses([1]))
        for number, bucket in enumerate(buckets(sender, weights)):
            if number == 0 and fault == "checksum":
                bucket = replace(bucket, checksums=((0,),))
            if number == 0 and fault == "not as announced":
                bucket = replace(bucket, tensors=(replace(bucket.tensors[0], name="x"), *bucket.tensors[1:]))
            if number == 0 and fault == "repeated":
                await engine.load([bucket])
            if not (number == 1 and fault == "missing"):
                await engine.load([bucket])
        await engine.commit()

    with pytest.raises(EngineError, match=fault):
        real_engine.run(update())
    with pytest.raises(EngineError, match="refuses to serve"):
        real_engine.generate(CONTEXT)
    engine.abort("a fault")
    if fault == "not as announced":  # nothing was overwritten
        assert_agrees(real_engine)
    else:
        with pytest.raises(EngineError, match="refuses to serve"):
            real_engine.generate(CONTEXT)
    assert engine.version == version

    real_engine.update(perturbed(real_engine.reference))
    assert_agrees(real_engine)


def test_an_engine_that_cannot_meet_the_sender_keeps_its_weights(real_engine: "RealEngine") -> None:
    """Nothing was overwritten, so the engine serves its weights again after the abort."""
    from tests.support.real_engine import manifest, perturbed
    from treepo.weight_sync.broadcast import BroadcastAddress

    engine = real_engine.engine
    nobody = BroadcastAddress(
        "127.0.0.1", 9, "weights-1", first=0, seconds=0.5, through_host=True, delta=False
    )

    async def update() -> None:
        await engine.begin(engine.version + 1, manifest(perturbed(real_engine.reference)))
        await engine.join([nobody])

    with pytest.raises(TransportError):
        real_engine.run(update())
    engine.abort("nobody sends")
    assert_agrees(real_engine)


def test_a_new_update_replaces_one_that_was_left_open(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import buckets, manifest, perturbed
    from tests.support.weight_sinks import CPU
    from treepo.weight_sync.colocated import ColocatedSender

    engine, weights = real_engine.engine, perturbed(real_engine.reference)

    async def abort() -> None:
        await engine.begin(engine.version + 1, manifest(weights))
        sender = ColocatedSender(CPU)
        await engine.join(sender.addresses([1]))
        await engine.load([next(buckets(sender, weights))])

    real_engine.run(abort())
    real_engine.update(weights)
    assert_agrees(real_engine)


def test_no_commit_and_no_load_without_begin(real_engine: "RealEngine") -> None:
    from treepo.weight_sync.disk import DiskAddress

    with pytest.raises(EngineError, match="begun"):
        real_engine.run(real_engine.engine.commit())
    with pytest.raises(EngineError, match="begun"):
        real_engine.run(real_engine.engine.join([DiskAddress()]))
    assert_agrees(real_engine)


@pytest.mark.parametrize("updates", [True, False])
def test_a_tree_s_shared_prefixes_are_computed_once_for_all_its_paths(
    real_engine: "RealEngine", updates: bool
) -> None:
    """All paths of a tree wait for an update, or arrive together: SGLang computes each token of the tree
    once, and of each context the last token, which it never takes from the cache. That is one token a path
    more or less, as its batches happen to be: a longer path may find the last token of a shorter one.
    """
    from tests.support.real_engine import perturbed, request, update

    engine, rng = real_engine.engine, np.random.default_rng(int(updates))
    paths = [rng.integers(4, 128, 50).astype(np.int32)]
    for number in range(40):
        above = paths[rng.integers(len(paths))]
        first = [4 + number]  # no two paths share a few tokens by chance, which no plan has
        paths.append(np.concatenate([above, first, rng.integers(4, 128, 39)]).astype(np.int32))
    paths += paths[-3:]
    weights = {name: tensor.clone() for name, tensor in perturbed(real_engine.reference).items()}

    async def scenario() -> list[GenerateOutput]:
        await engine.hold()
        waiting = [
            asyncio.ensure_future(engine.generate(request(path, max_tokens=1, seed=seed)))
            for seed, path in enumerate(paths)
        ]
        await asyncio.sleep(0.1)
        if updates:
            await update(engine, weights)
        else:
            await engine.clear_cache()
        engine.release()
        return await asyncio.gather(*waiting)

    outputs = real_engine.run(scenario())
    if updates:
        real_engine.reference.load_state_dict(weights)
    heads = {path[:length].tobytes() for path in paths for length in range(1, len(path))}
    computed = sum(len(path) - output.cached_tokens for path, output in zip(paths, outputs, strict=True))
    assert len(heads) <= computed <= len(heads) + 2 * len(paths)
    assert computed < sum(map(len, paths)) / 4
    for path, output in zip(paths, outputs, strict=True):
        expected = real_engine.log_probs(path, output.tokens, 1.0)
        np.testing.assert_allclose(output.log_probs, expected, atol=10 * TOLERANCE)
    again = real_engine.run(_together(real_engine, paths))
    assert [output.cached_tokens for output in again] == [len(path) - 1 for path in paths]


async def _together(real_engine: "RealEngine", paths: list[np.ndarray]) -> list[GenerateOutput]:
    from tests.support.real_engine import request

    return await asyncio.gather(*(real_engine.engine.generate(request(path, max_tokens=1)) for path in paths))
