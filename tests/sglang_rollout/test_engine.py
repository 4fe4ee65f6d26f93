"""The real SGLang engine: log-probs, stops, prefix cache, seeds, tensor-parallel ranks."""

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from treepo.errors import EngineError
from treepo.protocols import GenerateOutput

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

# float32 on both sides, logits of about one unit: two summation orders differ by about 1e-6. Tensor-parallel
# ranks add a third.
TOLERANCE = 1e-5


def prompts(count: int, seed: int) -> list[np.ndarray]:
    """Prompts of different lengths without end tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 128, size=rng.integers(2, 60)).astype(np.int32) for _ in range(count)]


def sample(real: "RealEngine", contexts: list[np.ndarray], **settings: object) -> list[GenerateOutput]:
    """Sample all of them at once, so that the engine batches them."""
    from tests.support.real_engine import request

    async def together() -> list[GenerateOutput]:
        return await asyncio.gather(*(real.engine.generate(request(c, **settings)) for c in contexts))

    return real.run(together())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_log_probs_are_those_of_the_sampling_distribution(
    real_engine: "RealEngine", temperature: float
) -> None:
    contexts = prompts(12, seed=1)
    for context, output in zip(
        contexts, sample(real_engine, contexts, temperature=temperature, max_tokens=40), strict=True
    ):
        expected = real_engine.log_probs(context, output.tokens, temperature)
        np.testing.assert_allclose(output.log_probs, expected, atol=TOLERANCE)


def test_log_probs_of_given_tokens_agree_with_hugging_face(real_engine: "RealEngine") -> None:
    for tokens in prompts(5, seed=2):
        expected = real_engine.log_probs(tokens[:1], tokens[1:], 1.0)
        np.testing.assert_allclose(
            real_engine.run(real_engine.engine.log_probs(tokens)), expected, atol=TOLERANCE
        )


def test_sampling_follows_the_distribution(real_engine: "RealEngine") -> None:
    """The first token's frequencies over many seeds match the reference's probabilities."""
    from tests.support.real_engine import VOCABULARY, request

    context, temperature, draws = prompts(1, seed=3)[0], 0.7, 2000

    async def many() -> list[GenerateOutput]:
        asked = request(context, max_tokens=1, temperature=temperature)
        return await asyncio.gather(
            *(real_engine.engine.generate(dataclasses.replace(asked, seed=seed)) for seed in range(draws))
        )

    counts = np.bincount([output.tokens[0] for output in real_engine.run(many())], minlength=VOCABULARY)
    expected = np.exp(
        [real_engine.log_probs(context, np.array([token]), temperature)[0] for token in range(VOCABULARY)]
    )
    # Total variation of an empirical distribution is at most about sqrt(k / n) / 2 = 0.13 for k = 128.
    assert np.abs(counts / draws - expected).sum() / 2 < 0.13


def test_generation_ends_at_each_end_token_and_keeps_it(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import END_TOKENS

    seen = set()
    for round_ in range(10):
        for output in sample(real_engine, prompts(60, seed=10 + round_), max_tokens=200, temperature=1.5):
            ended = output.tokens[-1] in END_TOKENS
            assert output.finish == ("eos" if ended else "length")
            assert not np.isin(output.tokens[:-1], END_TOKENS).any()
            assert ended or len(output.tokens) == 200
            seen |= {int(output.tokens[-1])} & set(END_TOKENS)
        if seen == set(END_TOKENS):
            return
    raise AssertionError(f"of the end tokens {END_TOKENS} only {seen} were sampled")


def test_a_continuation_finds_its_whole_prefix_cached(real_engine: "RealEngine") -> None:
    for context in prompts(6, seed=4):
        output = real_engine.generate(context)
        if output.finish == "length":
            longer = np.concatenate([context, output.tokens])
            assert real_engine.generate(longer).cached_tokens == len(longer) - 1


def test_check_every_stops_at_the_first_boundary_where_the_rule_holds(real_engine: "RealEngine") -> None:
    """The rule sees the response above the request too, and holds from some total length on."""
    context = prompts(1, seed=5)[0]
    above = 3
    for step, needed in [(1, 9), (4, 9), (8, 9), (16, 9), (8, 3 + 16), (8, 10_000)]:
        real_engine.stop_rule.holds = lambda response, needed=needed: len(response) >= needed
        expected = min(50, next(n for n in range(step, 20_000, step) if n + above >= needed))
        lengths = set()
        for seed in range(20):
            output = real_engine.generate(
                context, prompt_tokens=len(context) - above, max_tokens=50, check_every=step, seed=seed
            )
            assert output.finish == "eos" or len(output.tokens) == expected
            assert len(output.tokens) <= expected
            np.testing.assert_allclose(
                output.log_probs, real_engine.log_probs(context, output.tokens, 1.0), atol=TOLERANCE
            )
            lengths.add(len(output.tokens))
        assert expected in lengths


def test_the_rule_is_asked_only_at_boundaries_with_what_was_sampled(real_engine: "RealEngine") -> None:
    context, asked = prompts(1, seed=6)[0], []

    def never(response: np.ndarray) -> bool:
        asked.append(response)
        return False

    real_engine.stop_rule.holds = never
    output = real_engine.generate(context, max_tokens=40, check_every=8)
    assert [len(response) for response in asked] == list(range(8, len(output.tokens), 8))
    for response in asked:
        np.testing.assert_array_equal(response, output.tokens[: len(response)])


def test_a_seed_decides_the_tokens_whatever_runs_beside_it(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import request

    contexts = prompts(8, seed=7)

    async def one_by_one() -> list[GenerateOutput]:
        return [
            await real_engine.engine.generate(request(context, seed=seed, max_tokens=30))
            for seed, context in enumerate(contexts)
        ]

    async def together() -> list[GenerateOutput]:
        asked = [request(context, seed=seed, max_tokens=30) for seed, context in enumerate(contexts)]
        noise = [request(context, seed=99, max_tokens=60) for context in prompts(20, seed=8)]
        return (await asyncio.gather(*map(real_engine.engine.generate, asked + noise)))[: len(asked)]

    alone, beside = real_engine.run(one_by_one()), real_engine.run(together())
    for first, second in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(first.tokens, second.tokens)
    same_context = sample(real_engine, [contexts[0]], seed=0) + sample(real_engine, [contexts[0]], seed=1)
    assert same_context[0].tokens.tolist() != same_context[1].tokens.tolist()


def test_the_error_of_a_request_that_cannot_be_served_says_why(real_engine: "RealEngine") -> None:
    with pytest.raises(EngineError, match=r"together they may be 10\d\d"):
        real_engine.generate([5] * 10, max_tokens=5000)
    with pytest.raises(EngineError, match="vocabulary of 128"):
        real_engine.generate([500_000])


def test_the_longest_request_is_served_in_full_and_no_longer_one_at_all(real_engine: "RealEngine") -> None:
    """The model has 1024 positions; SGLang would answer a request for all of them with fewer tokens."""
    context, seeds = np.full(1000, 5, dtype=np.int32), iter(range(1000))
    longest = real_engine.engine._sglang.longest
    assert 1000 < longest <= 1024
    while True:
        output = real_engine.generate(context, max_tokens=longest - 1000, seed=next(seeds))
        if output.finish == "length":
            break
    assert len(output.tokens) == longest - 1000
    last = np.concatenate([context, output.tokens[:-1]])
    assert len(real_engine.generate(last, max_tokens=1).tokens) == 1
    with pytest.raises(EngineError, match="were requested"):
        real_engine.generate(context, max_tokens=longest - 999)


def test_a_cancelled_request_leaves_the_engine_usable(real_engine: "RealEngine") -> None:
    from tests.support.real_engine import request

    async def cancel() -> None:
        task = asyncio.ensure_future(real_engine.engine.generate(request([5, 6, 7], max_tokens=900)))
        while not real_engine.engine._requests._running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    real_engine.run(cancel())
    context = prompts(1, seed=9)[0]
    output = real_engine.generate(context)
    np.testing.assert_allclose(
        output.log_probs, real_engine.log_probs(context, output.tokens, 1.0), atol=TOLERANCE
    )


def test_two_tensor_parallel_ranks_give_the_references_log_probs_and_take_new_weights(tmp_path: Path) -> None:
    from tests.support.real_engine import perturbed, start, write_model

    with asyncio.Runner() as runner:
        real = start(write_model(tmp_path), runner.get_loop(), tensor=2)
        try:
            for version in (0, 1):
                if version:
                    assert real.update(perturbed(real.reference)) == 1
                contexts = prompts(8, seed=1)
                for context, output in zip(contexts, sample(real, contexts, max_tokens=40), strict=True):
                    assert output.version == version
                    expected = real.log_probs(context, output.tokens, 1.0)
                    np.testing.assert_allclose(output.log_probs, expected, atol=TOLERANCE)
            ranks = real.engine._sglang._children
            assert len(ranks) == 2
            ranks[1].kill()  # the rank that sends no answers
            assert "ended" in real.run(asyncio.wait_for(real.engine.died(), 30))
        finally:
            real.engine.close()
    assert not any(rank.is_running() for rank in ranks)
