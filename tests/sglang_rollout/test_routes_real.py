"""The real engine returns the experts with which it sampled: those of transformers' mixture, for every token
of cached, interrupted, stopped and retracted requests.
"""

import asyncio
import itertools
import shutil
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.sampling_policies import sampling
from treepo.data.prompts import Prompt
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.driver import TreeDriver
from treepo.routes import has_route
from treepo.tree import Tree

if TYPE_CHECKING:
    import torch

    from tests.support.real_engine import RealEngine

pytestmark = pytest.mark.slow

EXPERTS, CHOSEN, LAYERS = 8, 3, 3
TOLERANCE = 1e-4  # as in test_interruption_real.py
CLOSE = 1e-3  # router logits of about one unit, in float32: closer ones may change places


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator["RealEngine"]:
    """A Qwen3-MoE in an engine that retracts a request every few steps."""
    import tests.support.real_engine as harness
    from tests.support.tiny import write_tiny_qwen3_moe

    folder = write_tiny_qwen3_moe(
        tmp_path_factory.mktemp("mixture"),
        vocab_size=128,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        mlp_only_layers=[],  # SGLang knows no mixture with dense layers
        moe_intermediate_size=32,
        initializer_range=0.12,
        eos_token_id=list(range(1, 8)),
    )
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setenv("SGLANG_TEST_RETRACT", "1")
        patch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "13")
        real = harness.start(
            folder,
            runner.get_loop(),
            routes=True,
            sglang={"max_running_requests": 8, "chunked_prefill_size": 64},
        )
        yield real
        real.engine.close()


@dataclass
class Recorder:
    """An engine that notes what it was asked and answered."""

    real: "RealEngine"
    answers: list[tuple[GenerateRequest, GenerateOutput]] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        output = await self.real.engine.generate(request)
        self.answers.append((request, output))
        return output

    @property
    def interrupted(self) -> int:
        return sum(output.finish == "interrupted" for _, output in self.answers)


def computed(real: "RealEngine", path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The choice of transformers: sorted experts [T, layers, k], and whether it is clear [T, layers]."""
    import torch

    with torch.no_grad():
        logits = real.reference(torch.tensor(path[None], dtype=torch.long), output_router_logits=True)
    ranked = torch.stack([layer.float() for layer in logits.router_logits], dim=1).sort(-1, descending=True)
    clear = (ranked.values[..., CHOSEN - 1] - ranked.values[..., CHOSEN]) > CLOSE
    return ranked.indices[..., :CHOSEN].sort(-1).values.numpy(), clear.numpy()


def assert_computed(real: "RealEngine", path: np.ndarray, first: int, routes: np.ndarray) -> int:
    """`routes` are those of the path's tokens from `first` on; returns the number of compared choices."""
    assert routes.dtype == np.uint8
    assert routes.shape[1:] == (LAYERS, CHOSEN)
    expected, clear = computed(real, path)
    chosen = slice(first, first + len(routes))
    clear = clear[chosen]
    np.testing.assert_array_equal(np.sort(routes, axis=-1)[clear], expected[chosen][clear])
    return int(clear.sum())


async def grow(recorder: Recorder, prompts: int, step: int) -> list[Tree]:
    """Trees on an engine that is interrupted again and again."""
    interrupted = recorder.interrupted
    rng = np.random.default_rng(0)
    tokens = [rng.integers(8, 128, 40 + index).astype(np.int32) for index in range(prompts)]
    config = sampling(
        segment_tokens=16,
        max_response_tokens=80,
        fallback={"cut": "random", "window_tokens": 5, "aligned": False},
    )
    driver = TreeDriver([recorder], config, lambda each: f"{each}", seed=1, routes=True)

    async def sample() -> list[Tree]:
        given = [Prompt(str(index), each, "", "", "") for index, each in enumerate(tokens)]
        async with aclosing(driver.sample(given, step)) as results:
            return [result async for result in results if isinstance(result, Tree)]

    sampling_trees = asyncio.create_task(sample())
    while not sampling_trees.done() and recorder.interrupted < interrupted + 20:
        await asyncio.sleep(0.05)
        await recorder.real.engine.hold()
        recorder.real.engine.release()
    return await sampling_trees


def test_trees_have_the_routes_of_their_paths(mixture: "RealEngine", monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, retractions = Recorder(mixture), []
    generation = mixture.engine._generation
    read = generation._read_routes

    def note(request: GenerateRequest, answer: dict[str, Any], length: int) -> np.ndarray | None:
        retractions.append(answer["meta_info"]["num_retractions"])
        return read(request, answer, length)

    monkeypatch.setattr(generation, "_read_routes", note)
    mixture.stop_rule.holds = lambda response: bool(response[-1] % 3 == 0)

    def all_has_happened() -> bool:
        """An interruption changes what is sampled, so no number of trees is sure to have it all."""
        stopped = any(
            output.finish == "length" and len(output.tokens) < request.max_tokens
            for request, output in recorder.answers
        )
        cached = any(output.cached_tokens > 30 for _, output in recorder.answers)
        cut = any(segment.finish == "cut" for tree in trees for segment in tree.segments)
        return stopped and cached and cut and max(retractions) > 0 and recorder.interrupted > 0

    trees = mixture.run(grow(recorder, 4, step=0))
    while not all_has_happened() and len(trees) < 80:
        trees += mixture.run(grow(recorder, 4, step=len(trees)))
    assert all_has_happened()
    assert len(trees) % 4 == 0, "a tree failed"
    compared = choices = 0
    for tree in trees:
        prompt_routes = tree.prompt_routes
        assert prompt_routes is not None
        for leaf in tree.leaves:
            parts = [tree.segments[at].routes for at in tree.path(leaf.segment)]
            routes = np.concatenate([prompt_routes, *(part for part in parts if part is not None)])
            path = np.concatenate([tree.prompt, tree.response(leaf)])
            assert has_route(routes).tolist() == [True] * (len(path) - 1) + [False]
            compared += assert_computed(mixture, path, 0, routes[:-1])
            choices += (len(path) - 1) * LAYERS
    assert compared > 0.95 * choices


def with_noise(folder: Path, changed: Path) -> "dict[str, torch.Tensor]":
    """Write a model folder with other weights; returns them under the names of the files."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, changed)
    weights = load_file(folder / "model.safetensors")
    weights = {name: each + 0.05 * torch.randn_like(each) for name, each in weights.items()}
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    return weights


def test_each_piece_has_the_routes_of_its_version(mixture: "RealEngine", tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.real_engine import request, update

    engine, before = mixture.engine, mixture.engine.version
    mixture.stop_rule.holds = lambda _: False
    weights = with_noise(mixture.folder, tmp_path / "changed")
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "changed", dtype=torch.float32)
    models = {before: mixture.reference, before + 1: changed}
    context = np.arange(20, 50)

    async def pieces(seed: int) -> list[tuple[GenerateRequest, GenerateOutput]]:
        """All tokens of a path; each piece asks for the last context token's route and for its own."""
        path, left, parts = context, 200, []
        while left:
            asked = request(
                path, max_tokens=left, seed=seed, check_every=16, routes_from=len(path) - 1 if parts else 0
            )
            output = await engine.generate(asked)
            parts.append((asked, output))
            path, left = np.concatenate([path, output.tokens]), left - len(output.tokens)
            if output.finish == "eos":
                break
        return parts

    async def until_updated(seeds: Iterator[int]) -> list[list[tuple[GenerateRequest, GenerateOutput]]]:
        """One path after another, so that the update meets some that have begun."""
        paths = []
        while engine.version == before:
            paths.append(await pieces(next(seeds)))
        return paths

    async def scenario() -> list[list[tuple[GenerateRequest, GenerateOutput]]]:
        seeds = itertools.count()
        running = [asyncio.create_task(until_updated(seeds)) for _ in range(12)]
        while not engine._requests._running:
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)
        await update(engine, weights)
        return list(itertools.chain.from_iterable(await asyncio.gather(*running)))

    paths = mixture.run(scenario())
    assert any(parts[-1][1].version > parts[0][1].version for parts in paths)
    for asked, output in (each for parts in paths for each in parts):
        mixture.reference = models[output.version]
        assert output.routes is not None
        assert asked.routes_from is not None
        path = np.concatenate([asked.context, output.tokens])
        assert len(output.routes) == len(path) - 1 - asked.routes_from
        assert_computed(mixture, path, asked.routes_from, output.routes)
        expected = mixture.log_probs(asked.context, output.tokens, 1.0)
        np.testing.assert_allclose(output.log_probs, expected, atol=TOLERANCE)


def test_a_request_that_asks_for_no_routes_gets_none(mixture: "RealEngine") -> None:
    assert mixture.generate(np.arange(20, 50), max_tokens=4).routes is None
