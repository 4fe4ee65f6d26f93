"""What `top_p`, `top_k` and `min_p` do to a request, and to the log-probs that SGLang returns."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sglang_rollout.sampling_parameters import sampling_parameters
from treepo.protocols import GenerateRequest

if TYPE_CHECKING:
    from tests.support.real_engine import RealEngine

CONTEXT = np.array([1, 2], np.int32)


def test_a_request_names_every_parameter_because_a_server_may_have_defaults() -> None:
    plain = sampling_parameters(GenerateRequest(CONTEXT, 2, 5, 0.6, seed=7))
    assert plain == {
        "max_new_tokens": 5,
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "sampling_seed": 7,
    }
    given = sampling_parameters(GenerateRequest(CONTEXT, 2, 5, 1.0, 7, top_p=0.9, top_k=20, min_p=0.1))
    assert (given["top_p"], given["top_k"], given["min_p"]) == (0.9, 20, 0.1)


@pytest.mark.slow  # it imports SGLang
def test_log_probs_are_those_before_tokens_are_left_out() -> None:
    """So the trainer's, which are over all tokens, agree with them, and neither is the draw's."""
    from sglang_rollout.cpu.replacements import SeededSampler

    sampler: Any = SeededSampler.__new__(SeededSampler)
    torch.nn.Module.__init__(sampler)
    returned: list[torch.Tensor] = []

    def compute(log_probs: torch.Tensor, *_: object) -> Any:
        returned.append(log_probs.clone())
        return SimpleNamespace(write_output_to=lambda _: None)

    sampler.rl_on_policy_target, sampler.enable_deterministic = None, False
    sampler.use_log_softmax_logprob = sampler.use_ascend_backend = False
    sampler.output_logprob_processor = SimpleNamespace(compute_logprobs=compute)
    sampler._sync_token_ids_across_tp = lambda *_: None
    draws, temperature = 500, 0.5
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.5]]).repeat(draws, 1)
    info = SimpleNamespace(
        has_custom_logit_processor=False,
        return_sampling_masks=None,
        is_all_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=True,
        temperatures=torch.full((draws, 1), temperature),
        top_ks=torch.full((draws,), 3),
        top_ps=torch.full((draws,), 0.9),
        min_ps=torch.full((draws,), 0.2),
        sampling_seed=torch.arange(draws),
    )
    expected = torch.log_softmax(logits / temperature, dim=-1)
    output = SimpleNamespace(next_token_logits=logits)
    drawn = sampler.forward(output, info, True, [0] * draws, [None] * draws, torch.zeros(draws))
    # The same formula in another order of float32 operations.
    torch.testing.assert_close(returned[0], expected, atol=1e-5, rtol=1e-5)
    assert set(drawn.tolist()) == {2, 3}, "token 1 has 0.14 of the likeliest token's probability"


def stays(
    log_probs: torch.Tensor, token: int, top_p: float = 1.0, top_k: int = 128, min_p: float = 0
) -> bool:
    """Whether a token is among those that are left. log_probs: [V]. Rounding may move a border by 1e-4."""
    probs = log_probs.exp()
    likelier = probs[probs > probs[token]]
    return bool(
        len(likelier) < top_k
        and likelier.sum() <= top_p + 1e-4
        and probs[token] >= min_p * probs.max() * (1 - 1e-4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.8}])
def test_the_engine_draws_from_the_tokens_that_are_left(
    real_engine: "RealEngine", cut: dict[str, Any]
) -> None:
    context, temperature = [5, 6, 7, 8], 0.7

    def draws(**settings: Any) -> list[tuple[torch.Tensor, int]]:
        """For each token of six answers, all log-probs before it and the token."""
        found = []
        for seed in range(6):
            output = real_engine.generate(context, seed=seed, temperature=temperature, **settings)
            path = torch.tensor([[*context, *output.tokens]])
            with torch.no_grad():
                logits = real_engine.reference(path).logits[0, len(context) - 1 : -1]
            log_probs = (logits / temperature).log_softmax(-1)
            own = log_probs[torch.arange(len(output.tokens)), torch.from_numpy(output.tokens).long()]
            # float32 kernels of two libraries.
            np.testing.assert_allclose(output.log_probs, own.numpy(), atol=1e-4)
            found += zip(log_probs, output.tokens.tolist(), strict=True)
        return found

    left = draws(**cut)
    assert all(stays(log_probs, token, **cut) for log_probs, token in left)
    assert any(token != int(log_probs.argmax()) for log_probs, token in left), "it still draws"
    assert not all(stays(log_probs, token, **cut) for log_probs, token in draws())
