"""The supervised warm start: train a small model to solve the toy problems, carefully or carelessly.

At first it sees careful solutions only, which teach arithmetic fastest, then the mixture that
`problems.demonstrate` draws, which teaches it to give up. The loss is on the solution, not on the prompt.
Muon trains the layers' matrices and Adam the rest; on this task that needs several times fewer steps than
Adam alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from treepo.data.tokenizer import Tokenizer
from treepo.rollout import rng
from treepo.toy import problems
from treepo.toy.byte_tokenizer import EOS, EOS_ID, PAD_ID, VOCABULARY
from treepo.toy.muon import Muon
from treepo.toy.problems import Problem
from treepo.toy.recipe import Recipe

_IGNORE = -100  # the label of a token that is not trained
MAX_CONTEXT = 4096
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "dtype": "float32",
}

type Model = Qwen2ForCausalLM | Qwen3MoeForCausalLM


def new_model(seed: int, experts: int = 0) -> Model:
    """Make a random model with two layers, since depth costs an engine most.

    experts: in each layer, two for each token, in a Qwen3-MoE of two million parameters (8 experts); 0 for a
    Qwen2 of one million.
    """
    config = _mixture(experts) if experts else Qwen2Config(**_SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed("toy", seed, "model"))
        return Qwen2ForCausalLM(config) if isinstance(config, Qwen2Config) else Qwen3MoeForCausalLM(config)


def _mixture(experts: int) -> Qwen3MoeConfig:
    sizes = _SIZES | {"head_dim": _SIZES["hidden_size"] // _SIZES["num_attention_heads"]}
    return Qwen3MoeConfig(
        **sizes,  # its signature does not name head_dim
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        norm_topk_prob=True,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so sums round alike on all machines; small matrices gain little from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def warm_start(
    model: Model,
    tokenizer: Tokenizer,
    recipe: Recipe,
    seed: int,
    exclude: frozenset[Problem],
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train `model` in place, never on a problem in `exclude`.

    progress: called with (step, steps, loss) after each step.
    """
    draws = rng.generator("toy", seed, "demonstrations")
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = Muon(matrices, lr=recipe.muon_lr)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, recipe.rate) for o in (muon, adam)]
    model.train()
    for step in range(recipe.steps):
        tokens, labels = _batch(tokenizer, draws, recipe.batch, exclude, careful=step < recipe.careful_steps)
        loss = _loss(model, tokens.to(model.device), labels.to(model.device))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adam), schedules, strict=True):
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(step + 1, recipe.steps, loss.item())
    model.eval()


@torch.no_grad()
def sampled_accuracy(
    model: Model,
    tokenizer: Tokenizer,
    heldout: Sequence[Problem],
    samples: int,
    seed: int,
) -> float:
    """Sample `samples` responses to each problem at temperature 1; return the fraction that is correct."""
    prompts = torch.tensor([_prompt_tokens(tokenizer, problem) for problem in heldout], device=model.device)
    longest = max(len(_solution_tokens(tokenizer, problem.solution())) for problem in heldout)
    generator: Any = model  # transformers types `generate` for a class that no model satisfies
    with torch.random.fork_rng():
        torch.manual_seed(rng.seed("toy", seed, "samples"))
        sequences = generator.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=longest,
        )
    responses = [tokenizer.decode(tokens) for tokens in sequences[:, prompts.shape[1] :].cpu().numpy()]
    owners = [problem for problem in heldout for _ in range(samples)]
    return float(np.mean([problems.is_correct(o, r) for o, r in zip(owners, responses, strict=True)]))


def _prompt_tokens(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """Encode the problem as the user's message, with the assistant's turn opened."""
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": problem.text}])).tolist()


def _solution_tokens(tokenizer: Tokenizer, solution: str) -> list[int]:
    return tokenizer.encode(solution + EOS).tolist()


def _batch(
    tokenizer: Tokenizer,
    draws: np.random.Generator,
    size: int,
    exclude: frozenset[Problem],
    careful: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens and labels, int64 [size, T], padded on the right; only solutions have labels."""
    sequences: list[list[int]] = []
    prompt_lengths: list[int] = []
    while len(sequences) < size:
        problem = problems.draw_problem(draws)
        if problem in exclude:
            continue
        solution = problem.solution() if careful else problems.demonstrate(problem, draws)
        prompt = _prompt_tokens(tokenizer, problem)
        sequences.append(prompt + _solution_tokens(tokenizer, solution))
        prompt_lengths.append(len(prompt))
    tokens = torch.full((size, max(map(len, sequences))), PAD_ID)
    labels = torch.full_like(tokens, _IGNORE)
    for i, (sequence, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        labels[i, prompt_length : len(sequence)] = tokens[i, prompt_length : len(sequence)]
    return tokens, labels


def _loss(model: Model, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the labels. Causal attention does not see padding, which is on the right."""
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    chosen = targets != _IGNORE
    return functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])
