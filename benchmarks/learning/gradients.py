"""How noisy the gradient of each arm is at the start of training, before any step.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.gradients --only sums/grpo sums/treepo

`PROMPTS` problems are sampled `--repeats` times in each arm's way, by `treepo rollout`, and `SAMPLES` times
each sequentially, for the reference with GRPO's advantages. A gradient is that of the loss's first step: the
mean over tokens of advantage x log-prob. One JSON line an arm:

- decoded_tokens: of one repeat.
- noise: variance of a repeat's gradient over the squared length of the mean gradient, both unbiased.
- tokens_to_signal: noise x decoded_tokens, the tokens for which noise and signal are equally large. Gradients
  are means over trees, so this does not depend on the number of prompts.
- cosine: of one repeat's gradient with the reference, mean over repeats.
- cosine_of_mean: of their mean with it; below 1 by the noise that is left, and by the arm's bias.

`treepo rollout` drops no tree, so dynamic sampling changes nothing here. It grades nothing either: arms whose
trees read rewards while they grow are refused.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.learning.arms import ARMS, BASELINE, CONFIG, TASKS, overrides
from benchmarks.training_run import COMMAND
from treepo.config.learning import LearningConfig
from treepo.config.load import load_config
from treepo.data.tokenizer import load_tokenizer
from treepo.learning.advantage import estimate
from treepo.rollout import rng
from treepo.toy.make import make_toy
from treepo.toy.problems import draw_problems
from treepo.toy.warmstart import one_thread
from treepo.tree import Tree, from_json
from treepo.verdict import Verdict

PROMPTS = 16
SAMPLES = 512
CHUNK = 128


def sample(task: str, model: Path, chosen: Sequence[str], repeats: int) -> list[list[Tree]]:
    """Graded trees of the problems, `repeats` times. chosen: the overrides of sampling."""
    module = TASKS[task].module
    problems = draw_problems(rng.generator("gradients", task), PROMPTS, module.draw_problem)
    with tempfile.TemporaryDirectory() as folder:
        prompts, out = Path(folder) / "prompts.jsonl", Path(folder) / "out"
        rows = list(module.rows(problems, "gradients")) * repeats
        prompts.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        files = (f"model.path={model}", f"data.prompts={prompts}", f"out={out}", "max_prompts=null")
        command = [*COMMAND, "rollout", "examples/rollout.yaml", *files, *chosen]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        sampled = [from_json(line) for line in (out / "trees.jsonl").read_bytes().splitlines()]
    tokenizer = load_tokenizer(model)
    batches: list[dict[int, Tree]] = [{} for _ in range(repeats)]
    for tree in sampled:
        repeat, prompt = divmod(int(tree.prompt_id.rpartition(":")[2]), PROMPTS)
        grades: list[tuple[float | None, Verdict]] = []
        for leaf in tree.leaves:
            right = module.is_correct(problems[prompt], tokenizer.decode(tree.response(leaf)))
            grades.append((1.0, Verdict.CORRECT) if right else (-1.0, Verdict.WRONG))
        batches[repeat][prompt] = tree.graded(grades)
    return [[batch[prompt] for prompt in range(PROMPTS)] for batch in batches]


def gradient(model: PreTrainedModel, trees: Sequence[Tree], learning: LearningConfig) -> np.ndarray:
    """The gradient in all parameters, float32 [parameters], of a batch's policy loss at ratio 1."""
    advantages = estimate(trees, learning)
    offsets = advantages.forest.path_offset_L
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    prompts = [tree.prompt for tree, _ in leaves]
    responses = [tree.response(leaf) for tree, leaf in leaves]
    weights: list[np.ndarray] = []
    for number, (tree, leaf) in enumerate(leaves):
        lengths = [len(tree.segments[index].tokens) for index in tree.path(leaf.segment)]
        value = advantages.value_M[offsets[number] : offsets[number + 1]]
        weights.append(np.repeat(value, lengths) * advantages.token_weight_L[number])
    total = sum(
        float(weight) * len(response)
        for weight, response in zip(advantages.token_weight_L, responses, strict=True)
    )
    model.zero_grad()
    for start in range(0, len(leaves), CHUNK):
        part = slice(start, start + CHUNK)
        loss = _loss(model, prompts[part], responses[part], weights[part]) / total
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy().copy()


def _loss(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
) -> torch.Tensor:
    """Minus the sum over tokens of weight x log-prob. Causal attention does not see padding on the right."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = torch.zeros((len(prompts), longest), dtype=torch.int64)
    weight = torch.zeros((len(prompts), longest))
    for row, (prompt, response, own) in enumerate(zip(prompts, responses, weights, strict=True)):
        whole = np.concatenate([prompt, response])
        tokens[row, : len(whole)] = torch.from_numpy(whole.astype(np.int64))
        weight[row, len(prompt) : len(whole)] = torch.from_numpy(own.astype(np.float32))
    log_probs = model(tokens[:, :-1]).logits.log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -(weight[:, 1:] * chosen).sum()


def noise(gradients: np.ndarray) -> float:
    """Variance over squared mean of `gradients` [repeats, parameters], both unbiased; inf without signal."""
    repeats = len(gradients)
    products = gradients.astype(np.float64) @ gradients.astype(np.float64).T
    squares = float(np.trace(products)) / repeats
    signal = float(products.sum() - np.trace(products)) / (repeats * (repeats - 1))
    return (squares - signal) / signal if signal > 0 else float("inf")


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def main() -> None:
    names = [f"{task}/{arm}" for task in TASKS for arm in ARMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TASK/ARM")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--starts", type=Path, default=Path("runs/learning"), help="folder of the models")
    options = parser.parse_args()
    for task in dict.fromkeys(name.split("/")[0] for name in options.only):
        start = make_toy(options.starts / task, recipe=TASKS[task].starting, task=TASKS[task].module)
        model = AutoModelForCausalLM.from_pretrained(start.model)
        baseline = _sampling(task, BASELINE)
        with one_thread():
            (trees,) = sample(task, start.model, [*baseline, f"sampling.width={SAMPLES}"], repeats=1)
            reference = gradient(model, trees, LearningConfig(estimator="grpo"))
            for arm in [name.split("/")[1] for name in options.only if name.startswith(f"{task}/")]:
                learning = load_config(Path(CONFIG), overrides(task, arm)).learning
                batches = sample(task, start.model, _sampling(task, arm), options.repeats)
                gradients = np.stack([gradient(model, batch, learning) for batch in batches])
                tokens = sum(tree.unique_tokens() for batch in batches for tree in batch) / len(batches)
                line = {
                    "task": task,
                    "arm": arm,
                    "decoded_tokens": round(tokens),
                    "noise": noise(gradients),
                    "tokens_to_signal": noise(gradients) * tokens,
                    "cosine": float(np.mean([cosine(each, reference) for each in gradients])),
                    "cosine_of_mean": cosine(gradients.mean(axis=0), reference),
                    "repeats": options.repeats,
                }
                print(orjson.dumps(line).decode(), flush=True)  # noqa: T201 - the result


def _sampling(task: str, arm: str) -> list[str]:
    return [one for one in overrides(task, arm) if one.startswith("sampling.")]


if __name__ == "__main__":
    main()
