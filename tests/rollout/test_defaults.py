"""Trees of the policies of the paper and its official code stay as they are, bit for bit.

The record of their fallback cuts is newer.
"""

import asyncio
import hashlib
from contextlib import aclosing
from dataclasses import replace

import pytest

from tests.support.fake_engine import FakeEngine, decode, prompt_tokens
from tests.support.sampling_policies import POLICIES, sampling
from treepo.data.prompts import Prompt
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree, to_json

# Of the trees that these policies grew before any policy that is off by default was added.
DIGESTS = {
    "paper": "93e05ce682a1388c",
    "initial range": "6439ded28146a16e",
    "random budget": "a848622aa3a46fa9",
    "token budget": "823439dcbd24a691",
    "token cap": "76f95ee84ad4e6d9",
    "low mean": "d4b18b0e1aef3b14",
    "sinusoidal": "66366a6e457adae6",
    "with eos": "350d89747ac4b8f7",
    "looping": "03a17ec8ade0ac6a",
    "limit": "d0cd558be571490f",
    "min log-prob, unaligned": "2408799ba2c5cc16",
    "block, unaligned": "4bce055594c81623",
    "random, unaligned": "ee3e62c967aed095",
    "from start": "5775e3157c7375eb",
    "no fallback": "6c54750f9c97ba4e",
    "sequential": "f1780358db345137",
}


async def lines(policy: str) -> bytes:
    config = sampling(**POLICIES[policy])
    engine = FakeEngine(end=0.04, box=0.02, letters=5 if policy == "looping" else 400)
    prompts = [Prompt(f"train:{i}", prompt_tokens(i), "", "", "") for i in range(10)]
    driver = TreeDriver([engine], config, decode, seed=7)
    async with aclosing(driver.sample(prompts, step=3)) as results:
        trees = [tree async for tree in results if isinstance(tree, Tree)]
    return b"".join(sorted(to_json(replace(tree, cuts=())) for tree in trees))


@pytest.mark.parametrize("policy", DIGESTS)
def test_trees_are_as_before(policy: str) -> None:
    assert hashlib.sha256(asyncio.run(lines(policy))).hexdigest()[:16] == DIGESTS[policy]
