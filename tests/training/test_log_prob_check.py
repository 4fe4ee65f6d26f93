"""The log-prob check, with a small policy as engine and as trainer: no fault passes."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.fake_engine import routes_of
from tests.support.tiny_policy import VOCABULARY, TinyPolicy
from treepo.config.log_prob_check import LogProbCheckConfig
from treepo.config.run import RunConfig
from treepo.data.prompts import Prompt
from treepo.errors import EngineError, LogProbCheckError
from treepo.learning.packing import Pack
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.training.log_prob_check import check_log_probs

TEMPERATURE = 0.7


def on_chain(policy: TinyPolicy, tokens: np.ndarray) -> Tensor:
    """Logits [T, V] of one sequence."""
    token = torch.from_numpy(tokens).long()
    length = len(token)
    return policy(token, torch.arange(length), torch.full((length,), length))


@dataclass
class PolicyEngine:
    """Samples from a policy. temperature: overrides the request's. change: applied to the logits."""

    policy: TinyPolicy
    name: str = "engine 0"
    status: str = "serving"
    temperature: float | None = None
    change: Callable[[Tensor], Tensor] = lambda logits: logits
    fails: bool = False

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        if self.fails:
            raise EngineError("the fake engine fails on purpose")
        return self._sample(request)

    @torch.no_grad()
    def _sample(self, request: GenerateRequest) -> GenerateOutput:
        generator = torch.Generator().manual_seed(request.seed % 2**63)
        tokens, log_probs = request.context, []
        for _ in range(request.max_tokens):
            logits = self.change(on_chain(self.policy, tokens)[-1])
            distribution = (logits / (self.temperature or request.temperature)).log_softmax(-1)
            token = int(torch.multinomial(distribution.exp(), 1, generator=generator))
            log_probs.append(float(distribution[token]))
            tokens = np.append(tokens, np.int32(token))
        return GenerateOutput(
            tokens=tokens[len(request.context) :],
            log_probs=np.array(log_probs, dtype=np.float32),
            version=0,
            finish="length",
            cached_tokens=len(request.context) - 1,
            routes=None if request.routes_from is None else routes_of(tokens[:-1], 0)[request.routes_from :],
        )


@dataclass
class PolicyTrainer:
    """Computes log-probs with a policy. padding: columns of logit 0 that its softmax includes."""

    policy: TinyPolicy
    padding: int = 0
    dtype: str = "float32"
    has_device: bool = False
    packs: list[Pack] = field(default_factory=list)  # of the last call

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """Of the engines, which share the trainer's device."""
        self.has_device = True
        yield
        self.has_device = False

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        assert self.has_device
        self.packs = list(chain.from_iterable(packs))
        return [[self._log_probs(pack, temperature) for pack in replica] for replica in packs]

    @torch.no_grad()
    def _log_probs(self, pack: Pack, temperature: float) -> np.ndarray:
        columns = {
            name: torch.tensor(column).long() for name, column in pack.columns().items() if column.ndim == 1
        }
        logits = self.policy(columns["token"], columns["position"], columns["exit"])
        logits = torch.nn.functional.pad(logits, (0, self.padding)) / temperature
        log_probs = logits.log_softmax(-1)[columns["source"]]
        chosen = log_probs[torch.arange(len(pack)), columns["token"]]
        return torch.where(columns["source"] >= 0, chosen, 0.0).numpy().astype(np.float32)


def config_of(
    dtype: str = "float32", replicas: int = 1, *, routing_replay: str = "none", **log_prob_check: object
) -> RunConfig:
    return RunConfig.model_validate({
        "out": "run",
        "steps": 1,
        "model": {"path": "model", "dtype": dtype},
        "data": {"train": "train.jsonl", "prompts_per_step": 4, "max_prompt_tokens": 8},
        "sampling": {
            "segment_tokens": 8,
            "max_response_tokens": 64,
            "temperature": TEMPERATURE,
            "stops": {"boxed": "off"},
            "retry_seconds": 0.0,
        },
        "trainer": {
            "max_tokens_per_pack": 72,
            "parallel": {"data": replicas},
            "routing_replay": routing_replay,
        },
        "log_prob_check": log_prob_check,
    })  # fmt: skip


def check(engines: Sequence[PolicyEngine], trainer: PolicyTrainer, config: RunConfig) -> dict[str, float]:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{index}", rng.integers(0, VOCABULARY, 3 + index % 4).astype(np.int32), "", "", "")
        for index in range(12)
    ]
    trainer.dtype = config.model.dtype
    return asyncio.run(check_log_probs(config, prompts, str, engines, trainer, trainer.training))


def changed(policy: TinyPolicy, change: Callable[[Tensor], Tensor]) -> TinyPolicy:
    """A copy with other weights."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(change(parameter))
    return other


def rounded(policy: TinyPolicy) -> TinyPolicy:
    return changed(policy, lambda weight: weight.to(torch.bfloat16).double())


@pytest.mark.parametrize("replicas", [1, 2])
def test_equal_ones_agree(replicas: int) -> None:
    policy = TinyPolicy()
    engines = [PolicyEngine(policy), PolicyEngine(policy, name="engine 1")]
    figures = check(engines, PolicyTrainer(policy), config_of(replicas=replicas))
    # The same float64 numbers in another order, of about 3, rounded to float32 on both sides.
    assert figures["mean"] <= figures["max"] < 1e-6
    # A shared segment and two below it for each of four prompts on each engine.
    assert figures["tokens"] == 2 * 4 * 3 * 8


def test_the_trainer_gets_the_routes_that_it_replays() -> None:
    policy = TinyPolicy()
    trainer = PolicyTrainer(policy)
    check([PolicyEngine(policy)], trainer, config_of(routing_replay="rollout"))
    assert trainer.packs
    for pack in trainer.packs:
        assert pack.route is not None
        for index in np.flatnonzero(pack.source >= 0):
            path = [above for above in range(index + 1) if pack.exit[above] > index]
            expected = routes_of(pack.token[path], 0)[-1]
            is_last = pack.exit[index] == index + 1
            np.testing.assert_array_equal(pack.route[index], 255 if is_last else expected)
    check([PolicyEngine(policy)], trainer, config_of(routing_replay="trainer"))
    assert all(pack.route is None for pack in trainer.packs)


@pytest.mark.parametrize(("routing_replay", "is_suspect"), [("none", True), ("rollout", False)])
def test_routing_is_a_suspect_unless_it_is_replayed(routing_replay: str, is_suspect: bool) -> None:
    engine, trainer = PolicyEngine(TinyPolicy()), PolicyTrainer(TinyPolicy(seed=1))
    with pytest.raises(LogProbCheckError) as error:
        check([engine], trainer, config_of(routing_replay=routing_replay))
    assert ("trainer.routing_replay" in str(error.value)) == is_suspect


def shifted_row(logits: Tensor) -> Tensor:
    return logits.index_copy(-1, torch.tensor([7]), logits[..., 8:9])


FAULTS = {
    "the engine ignores the temperature": lambda policy: (
        PolicyEngine(policy, temperature=1.0),
        PolicyTrainer(policy),
    ),
    "the vocabulary's rows are shifted by one": lambda policy: (
        PolicyEngine(policy, change=lambda logits: logits.roll(1, dims=-1)),
        PolicyTrainer(policy),
    ),
    "stale weights: the trainer has taken a step": lambda policy: (
        PolicyEngine(policy),
        PolicyTrainer(changed(policy, lambda weight: weight + 0.05 * weight.sign())),
    ),
    "other weights": lambda policy: (PolicyEngine(policy), PolicyTrainer(TinyPolicy(seed=1))),
    "weights that are not numbers": lambda policy: (
        PolicyEngine(policy),
        PolicyTrainer(changed(policy, lambda weight: weight * torch.nan)),
    ),
}

SMALL_FAULTS = {  # on this policy no larger than rounding to bfloat16
    "one row of the vocabulary is its neighbour's": lambda policy: (
        PolicyEngine(policy, change=shifted_row),
        PolicyTrainer(policy),
    ),
    "the trainer's softmax includes padding": lambda policy: (
        PolicyEngine(policy),
        PolicyTrainer(policy, padding=14),
    ),
}
CASES = [
    pytest.param(fault, dtype, id=f"{name} ({dtype})")
    for faults, dtypes in ((FAULTS, ("float32", "bfloat16")), (SMALL_FAULTS, ("float32",)))
    for name, fault in faults.items()
    for dtype in dtypes
]


@pytest.mark.parametrize(("fault", "dtype"), CASES)
def test_a_fault_stops_the_run(fault, dtype: str) -> None:
    engine, trainer = fault(TinyPolicy())
    with pytest.raises(LogProbCheckError) as error:
        check([engine], trainer, config_of(dtype))
    message = str(error.value)
    assert "\n" not in message
    for part in ("engine 0", "temperature 0.7", "at prompt p", "response token", "vocabulary padding"):
        assert part in message


def test_rounding_to_bfloat16_passes_as_bfloat16_only() -> None:
    policy = TinyPolicy()
    engine, trainer = PolicyEngine(policy), PolicyTrainer(rounded(policy))
    assert 2e-3 < check([engine], trainer, config_of("bfloat16"))["mean"] < 5e-2
    with pytest.raises(LogProbCheckError):
        check([engine], trainer, config_of("float32"))


def test_limits_are_those_of_the_configuration() -> None:
    policy = TinyPolicy()
    engine, trainer = PolicyEngine(policy), PolicyTrainer(rounded(policy))
    figures = check([engine], trainer, config_of("bfloat16"))
    for key, name in (("mean_limit", "mean"), ("max_limit", "max")):
        assert check([engine], trainer, config_of("bfloat16", 1, **{key: figures[name]})) == figures
        with pytest.raises(LogProbCheckError, match=key):
            check([engine], trainer, config_of("bfloat16", 1, **{key: 0.99 * figures[name]}))
    assert LogProbCheckConfig(mean_limit=0.1).limits("float32") == (
        0.1,
        LogProbCheckConfig().limits("float32")[1],
    )


def test_the_engine_and_the_token_are_named() -> None:
    """The second of two engines is the faulty one, in one token that it is sure to sample."""
    policy = TinyPolicy()
    favourite = torch.zeros(VOCABULARY, dtype=torch.float64).index_fill(0, torch.tensor([7]), 4.0)
    engines = [
        PolicyEngine(policy),
        PolicyEngine(policy, name="engine 1", change=lambda logits: logits + favourite),
    ]
    with pytest.raises(
        LogProbCheckError, match=r"engine 1 disagree.*at prompt p[0-3], response token \d+ \("
    ):
        check(engines, PolicyTrainer(policy), config_of())


def test_an_engine_that_cannot_sample_is_named() -> None:
    policy = TinyPolicy()
    engines = [PolicyEngine(policy), replace(PolicyEngine(policy), name="engine 1", fails=True)]
    with pytest.raises(EngineError, match=r"engine 1 cannot sample: .*on purpose"):
        check(engines, PolicyTrainer(policy), config_of())
