"""The supervised warm start: a small Qwen2 that solves the toy problems, carefully or carelessly.

It sees careful solutions only at first, which teaches arithmetic fastest, and then the mixture that
`problems.demonstrate` draws, which teaches it to give up. The loss is on the solution, not on the prompt.
Muon moves the matrices of the layers and Adam the rest; on this task Muon needs several times fewer steps
than Adam alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from treepo import rng
from treepo.toy import problems
from treepo.toy.problems import Problem

_IGNORE = -100
_MAX_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the warm start does; changed only by someone who measures again (tests/test_toy_make.py)."""

    steps: int = 350
    careful_steps: int = 210
    """The first steps, on careful solutions alone."""
    batch: int = 32
    """Demonstrations in one step."""
    warmup_steps: int = 20
    flat_steps: int = 20
    """Steps before the learning rates begin to fall, linearly, to nothing."""
    muon_lr: float = 0.01
    adam_lr: float = 0.01


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """About a million random parameters: few layers, because a layer costs an engine more than width does."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed("toy", seed, "model"))
        return Qwen2ForCausalLM(config)
