"""The toy folder: its content, when it is made again, and that equal seeds give equal toys."""

import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from treepo.config.data import DataConfig
from treepo.data.prompts import load_prompts
from treepo.data.tokenizer import Tokenizer, load_tokenizer
from treepo.errors import ConfigError
from treepo.toy.byte_tokenizer import EOS_ID, PAD_ID, VOCABULARY, byte_tokenizer
from treepo.toy.make import ToyReport, make_toy
from treepo.toy.muon import Muon, orthogonalize
from treepo.toy.recipe import EXPERTS_PER_TOKEN, MIXTURE, RECIPE
from treepo.toy.warmstart import imbalance, new_model

# A toy that has learned nothing yet, in about a second.
SHORT = replace(
    RECIPE,
    train_problems=24,
    heldout_problems=8,
    measured_samples=1,
    steps=2,
    careful_steps=1,
    warmup_steps=1,
    batch=2,
)
SHORT_MIXTURE = replace(SHORT, experts=MIXTURE.experts)


_BYTES = byte_tokenizer(4096)


@pytest.fixture(scope="module")
def making(tmp_path_factory: pytest.TempPathFactory) -> tuple[ToyReport, bool]:
    """A toy, and whether making it left torch's random state alone."""
    before = torch.get_rng_state()
    report = make_toy(tmp_path_factory.mktemp("toy") / "out", recipe=SHORT)
    return report, torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def made(making: tuple[ToyReport, bool]) -> ToyReport:
    return making[0]


@pytest.fixture
def copy(made: ToyReport, tmp_path: Path) -> Path:
    """A copy of the toy's folder, to be damaged or made again."""
    return shutil.copytree(made.model.parent, tmp_path / "copy")


@pytest.fixture(scope="module")
def tokenizer(made: ToyReport) -> Tokenizer:
    return load_tokenizer(made.model)


def _weights(report: ToyReport) -> bytes:
    return (report.model / "model.safetensors").read_bytes()


def _steps_taken(out: Path, **settings: object) -> tuple[ToyReport, int]:
    """The report, and the training steps that making it took."""
    calls: list[int] = []
    report = make_toy(out, recipe=SHORT, progress=lambda step, _steps, _loss: calls.append(step), **settings)  # pyright: ignore[reportArgumentType]  # seed and force
    return report, len(calls)


def test_the_model_is_one_that_transformers_loads(made: ToyReport) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.model)
    assert model.dtype == torch.float32
    assert 1_000_000 <= made.parameters <= 4_000_000
    assert sum(parameter.numel() for parameter in model.parameters()) == made.parameters
    assert (model.config.eos_token_id, model.config.pad_token_id) == (EOS_ID, PAD_ID)
    assert model.config.vocab_size == VOCABULARY
    assert model.config.max_position_embeddings == 4096


def test_the_data_read_as_prompts_and_the_two_files_are_disjoint(
    made: ToyReport, tokenizer: Tokenizer
) -> None:
    config = DataConfig(train=made.train)
    train, heldout = (
        load_prompts(path, config.columns, tokenizer, config) for path in (made.train, made.heldout)
    )
    assert (len(train), len(heldout)) == (SHORT.train_problems, SHORT.heldout_problems)
    texts = [prompt.text for prompts in (train, heldout) for prompt in prompts]
    assert len(set(texts)) == len(texts)
    assert {prompt.source for prompt in train} == {"treepo_toy.train"}
    row = orjson.loads(made.train.read_bytes().splitlines()[3])
    assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert row["extra_info"] == {"index": 3, "split": "train"}
    assert row["reward_model"] == {"ground_truth": train[3].answer, "style": "rule"}


def test_a_second_call_neither_trains_nor_loads_torch(made: ToyReport) -> None:
    assert _steps_taken(made.model.parent) == (replace(made, cached=True), 0)
    code = (
        "import sys; from pathlib import Path; from treepo.toy.make import make_toy;"
        "from treepo.toy.recipe import Recipe;"
        f"print(make_toy(Path({str(made.model.parent)!r}), recipe={SHORT!r}).cached, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_toy_that_is_not_whole_is_made_again(made: ToyReport, copy: Path) -> None:
    for damage in (
        lambda: (copy / "toy.json").unlink(),
        lambda: (copy / "train.jsonl").write_bytes(made.train.read_bytes()[:100]),
        lambda: (copy / "model" / "tokenizer.json").unlink(),
    ):
        assert _steps_taken(copy)[1] == 0
        damage()
        again, steps = _steps_taken(copy)
        assert (steps, again.cached) == (SHORT.steps, False)
        # Equal seeds give equal toys, bit for bit, on one machine.
        assert _weights(again) == _weights(made)
        assert again.sampled_accuracy == made.sampled_accuracy


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    with pytest.raises(ConfigError, match=f"{path}: it is a file"):
        make_toy(path)


def test_force_makes_it_again_and_another_seed_makes_another(made: ToyReport, copy: Path) -> None:
    again, steps = _steps_taken(copy, force=True)
    assert steps == SHORT.steps
    assert again.train.read_bytes() == made.train.read_bytes()
    one, steps = _steps_taken(copy, seed=1)
    assert steps == SHORT.steps
    assert _weights(one) != _weights(made)
    assert one.train.read_bytes() != made.train.read_bytes()


def test_the_callers_random_state_is_left_alone(making: tuple[ToyReport, bool]) -> None:
    assert making[1]


def test_a_mixture_trains_every_expert(made: ToyReport, copy: Path) -> None:
    """The folder of a dense toy becomes the mixture's, with the same problems."""
    mixture = make_toy(copy, recipe=SHORT_MIXTURE)
    assert (mixture.cached, mixture.family) == (False, "Qwen3-MoE, 2 of 8 experts a token")
    assert mixture.train.read_bytes() == made.train.read_bytes()
    assert make_toy(copy, recipe=SHORT_MIXTURE) == replace(mixture, cached=True)
    model = AutoModelForCausalLM.from_pretrained(mixture.model)
    assert (model.config.model_type, model.dtype) == ("qwen3_moe", torch.float32)
    assert 1_500_000 <= mixture.parameters <= 2_500_000
    assert sum(parameter.numel() for parameter in model.parameters()) == mixture.parameters
    start = new_model(0, MIXTURE.experts)
    for name, parameter in model.named_parameters():
        moved = (parameter != start.get_parameter(name)).flatten(1 if parameter.ndim == 3 else 0)
        assert moved.any(-1).all(), name


def test_imbalance_is_1_for_even_use_and_grows() -> None:
    experts = 8
    even = 5 * torch.eye(experts).roll(1, 1) + 9 * torch.eye(experts)
    assert imbalance(even).item() == pytest.approx(1)  # each expert is first once and second once
    collapsed = torch.zeros(20, experts)
    collapsed[:, :EXPERTS_PER_TOKEN] = 30.0
    assert imbalance(collapsed).item() == pytest.approx(experts / EXPERTS_PER_TOKEN)


@given(st.text())
def test_any_text_passes_through_the_tokenizer(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    tokens = _BYTES.hugging_face.encode(text)
    assert _BYTES.hugging_face.decode(tokens) == composed
    assert len(tokens) == len(composed.encode())


def test_the_saved_tokenizer_is_the_one_that_was_made(tokenizer: Tokenizer) -> None:
    text = "<|user|>Wie groß ist 数?\r\n\t\x00<|eos|>"
    assert tokenizer.hugging_face.encode(text) == _BYTES.hugging_face.encode(text)
    assert tokenizer.hugging_face.decode(tokenizer.hugging_face.encode(text)) == text
    assert tokenizer.end_tokens == (EOS_ID,) == _BYTES.end_tokens
    assert tokenizer.hugging_face.pad_token_id == PAD_ID
    assert len(tokenizer.hugging_face) == VOCABULARY


def test_the_chat_template_keeps_every_message_as_it_is(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": " be brief\n"},
        {"role": "user", "content": "\n1 plus 1 = ? "},
    ]
    assert (
        tokenizer.render(messages)
        == "<|system|> be brief\n<|eos|><|user|>\n1 plus 1 = ? <|eos|><|assistant|>"
    )
    assert np.array_equal(tokenizer.encode("<|assistant|>"), [4])


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16), (1, 5)])
def test_muon_keeps_directions_and_evens_out_their_sizes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    within = left.T @ orthogonalize(matrix) @ right.T
    sizes = within.diagonal()
    # The iteration is a polynomial of the singular values: it commutes with the directions up to rounding.
    assert torch.allclose(within, torch.diag(sizes), atol=1e-4)
    # Five iterations of these coefficients bring anything above 1/100 of the norm to between 0.6 and 1.3.
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3


def test_muon_takes_a_stack_of_matrices_as_each_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn((3, 6, 4), generator=generator))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, apart = Muon([stack], lr=0.1), Muon(alone, lr=0.1)
    for _ in range(2):
        stack.grad = torch.randn((3, 6, 4), generator=generator)
        for matrix, gradient in zip(alone, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        together.step()
        apart.step()
    assert all(torch.equal(one, other) for one, other in zip(stack, alone, strict=True))


@pytest.mark.slow
def test_the_whole_toy_is_right_on_two_in_five_answers(tmp_path: Path) -> None:
    """Takes one to two minutes on two cores."""
    report = make_toy(tmp_path)
    assert 0.30 <= report.sampled_accuracy <= 0.50
