"""The check `routing`: a real Megatron-Core trainer on a toy mixture replays the experts that transformers
chose, and then has transformers' log-probs.

How often its own routers would have chosen others is what rounding does to a mixture on this machine.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import numpy as np

from treepo.doctor.check import Outcome, failed, passed

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

    from treepo.tree import Tree

_EXPERTS, _PER_TOKEN = 16, 4
_PACK_TOKENS = 128


def routing() -> Outcome:
    import torch

    from megatron_bridge.trainer import MegatronTrainer, create_store
    from treepo.config.learning import LearningConfig
    from treepo.config.trainer import TrainerConfig
    from treepo.doctor.toy_model import TOLERANCE, max_difference, native_dtype
    from treepo.learning import advantage, loss
    from treepo.learning.packing import pack_trees

    dtype, folder, learning = native_dtype(), Path(mkdtemp()), LearningConfig()
    mixture = toy_mixture()
    mixture.save_pretrained(folder)
    # Rounded to the dtype first, so that only the computation differs.
    tree, expected = routed_tree(mixture.to(getattr(torch, dtype)).float())
    (packs,) = pack_trees([tree], advantage.estimate([tree], learning), _PACK_TOKENS, 1)
    config = TrainerConfig(routing_replay="rollout")
    trainer = MegatronTrainer(folder, dtype, config, learning, 0, 1, create_store())
    (log_probs,) = trainer.log_probs(packs, 1.0)
    result = trainer.train_batch([(packs, loss.denominator([packs], learning))], 1.0)
    trainer.close()
    error = max_difference(log_probs[len(tree.prompt) :], expected)
    found = (
        f"with the experts of transformers a mixture's log-probs differ from its by {error:.1g} ({dtype}); "
        f"{result.own_choice_differs:.1%} of the trainer's routers would have chosen others"
    )
    if not error <= TOLERANCE[dtype]:  # a NaN fails too
        return failed(
            f"{found}; a difference of at most {TOLERANCE[dtype]:g} is allowed",
            "routes are not replayed as they are given: check the versions of the packages",
        )
    return passed(f"{found} (trainer.routing_replay = rollout: they get the engine's)")


def toy_mixture() -> "Qwen3MoeForCausalLM":
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # type: ignore[call-arg]  # its constructor takes it, unnamed
        num_experts=_EXPERTS,
        num_experts_per_tok=_PER_TOKEN,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,  # far from a flat distribution
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config)


def routed_tree(mixture: "Qwen3MoeForCausalLM") -> tuple["Tree", np.ndarray]:
    """Two answers with the mixture's routes, and its log-probs of their tokens: float32 [T]."""
    import torch

    from treepo.doctor.toy_model import random_tokens
    from treepo.doctor.trainer_check import tree_of_two_answers
    from treepo.routes import dtype_for

    tree = tree_of_two_answers(random_tokens())
    prompt, expected, segments = len(tree.prompt), [], []
    routes = np.empty(0)
    for segment in tree.segments:
        path = torch.from_numpy(np.concatenate([tree.prompt, segment.tokens])).long()
        with torch.no_grad():
            output = mixture(path[None], output_router_logits=True)
        chosen = [logits.topk(_PER_TOKEN).indices.numpy() for logits in output.router_logits]
        routes = np.stack(chosen, axis=1).astype(dtype_for(_EXPERTS))
        segments.append(replace(segment, routes=routes[prompt:]))
        log_probs = output.logits[0, :-1].log_softmax(-1).gather(1, path[1:, None])[:, 0]
        expected.append(log_probs[prompt - 1 :].numpy())
    return replace(tree, segments=tuple(segments), prompt_routes=routes[:prompt]), np.concatenate(expected)
