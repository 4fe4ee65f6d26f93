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
from treepo.toy.recipe import EXPERTS_PER_TOKEN, Recipe

_IGNORE = -100  # the label of a token that is not trained
_BALANCE = 0.01  # weight of the routers' imbalance; without it three experts of eight get all tokens
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

    experts: in each layer of a Qwen3-MoE; 0 for a Qwen2.
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
        num_experts_per_tok=EXPERTS_PER_TOKEN,
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
    """Mean cross entropy of the labels, and for a mixture the routers' imbalance.

    Causal attention does not see padding, which is on the right.
    """
    mixture = isinstance(model, Qwen3MoeForCausalLM)
    routers = {"output_router_logits": True} if mixture else {}
    outputs = model.model(tokens[:, :-1], use_cache=False, **routers)
    targets = labels[:, 1:]
    chosen = targets != _IGNORE
    loss = functional.cross_entropy(model.lm_head(outputs.last_hidden_state[chosen]), targets[chosen])
    if mixture:
        uneven = [imbalance(logits[chosen.flatten()]) for logits in outputs.router_logits]
        loss = loss + _BALANCE * torch.stack(uneven).mean()
    return loss


def imbalance(logits: torch.Tensor) -> torch.Tensor:
    """Measure how unevenly a router uses its experts: 1 for even use, more otherwise.

    Equation 4 of Switch Transformers (https://arxiv.org/abs/2101.03961), with `EXPERTS_PER_TOKEN` experts a
    token. logits: [T, experts].
    """
    tokens, experts = logits.shape
    picked = logits.topk(EXPERTS_PER_TOKEN).indices.flatten().bincount(minlength=experts)
    share = picked / (tokens * EXPERTS_PER_TOKEN)
    return experts * (share * logits.softmax(-1).mean(0)).sum()
