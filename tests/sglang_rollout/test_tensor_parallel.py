"""One engine of two tensor-parallel ranks: log-probs before and after a weight update, and its end."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # as in test_engine.py, against the same reference; ranks add one more summation order


def test_two_ranks_give_the_reference_s_log_probs_and_take_new_weights(tmp_path: Path) -> None:
    from tests.sglang_rollout.test_engine import prompts, sample
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
            ranks = real.engine._server._children
            assert len(ranks) == 2
            ranks[1].kill()  # the rank that answers nothing itself
            assert "ended" in real.run(asyncio.wait_for(real.engine.died(), 30))
        finally:
            real.engine.close()
    assert not any(rank.is_running() for rank in ranks)
