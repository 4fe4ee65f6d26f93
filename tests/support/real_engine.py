"""A real SGLang engine for the whole test session, and the Hugging Face model that it must agree with."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sglang_rollout.engine import SGLangEngine
from sglang_rollout.rank_store import Meeting
from tests.support.tiny import write_tiny_qwen2
from treepo.config.engine import EngineConfig
from treepo.config.trainer import LoraConfig
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.weight_sync.colocated import ColocatedSender
from treepo.weight_sync.shards import views
from treepo.weight_sync.wire import Bucket, Manifest, TensorInfo, checksums

END_TOKENS = (1, 2, 3)
VOCABULARY = 128


class SwitchableRule:
    """A stop rule that each test replaces by its own."""

    def __init__(self) -> None:
        self.holds: Callable[[np.ndarray], bool] = lambda _: False

    def __call__(self, response: np.ndarray) -> bool:
        return self.holds(response)


@dataclass
class RealEngine:
    """engine: bound to one loop, so use it through `run` only. reference: a Hugging Face model with the
    weights that the engine serves.
    """

    engine: SGLangEngine
    folder: Path
    reference: PreTrainedModel
    stop_rule: SwitchableRule
    loop: asyncio.AbstractEventLoop

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def generate(self, context: Sequence[int] | np.ndarray, **settings: Any) -> GenerateOutput:
        return self.run(self.engine.generate(request(context, **settings)))

    def update(self, changed: dict[str, torch.Tensor]) -> int:
        """Commit `changed` as the next version to the engine, and load it into the reference."""
        version = self.run(update(self.engine, changed))
        self.reference.load_state_dict(changed, strict=False)
        return version

    def log_probs(
        self, context: Sequence[int] | np.ndarray, tokens: np.ndarray, temperature: float
    ) -> np.ndarray:
        """The reference's log-probs of `tokens` after `context`."""
        path = torch.tensor([[*context, *tokens]], dtype=torch.long)
        with torch.no_grad():
            log_probs = (self.reference(path).logits[0] / temperature).log_softmax(-1)
        chosen = path[0, len(context) :]
        return log_probs[len(context) - 1 : -1].gather(1, chosen[:, None])[:, 0].numpy()


def request(context: Sequence[int] | np.ndarray, **settings: Any) -> GenerateRequest:
    """A request for 16 tokens at temperature 1, all of whose context is prompt, unless `settings` differ."""
    defaults = {"prompt_tokens": len(context), "max_tokens": 16, "temperature": 1.0, "seed": 0}
    return GenerateRequest(context=np.asarray(context, dtype=np.int32), **(defaults | settings))


def perturbed(model: PreTrainedModel, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """All tensors of a model with a little noise added."""
    return {name: tensor + scale * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def manifest(tensors: dict[str, torch.Tensor]) -> Manifest:
    return tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())


async def update(engine: SGLangEngine, tensors: dict[str, torch.Tensor]) -> int:
    """Run the whole update transaction, with buckets from this process's memory."""
    await engine.begin(engine.version + 1, manifest(tensors))
    sender = ColocatedSender(torch.device("cpu"))
    await engine.join(sender.addresses([engine._sglang.ranks]))
    for bucket in buckets(sender, tensors):
        await engine.load([bucket])
    sender.end(engine.version + 1)
    return await engine.commit()


def buckets(sender: ColocatedSender, tensors: dict[str, torch.Tensor], count: int = 3) -> Iterator[Bucket]:
    """The tensors in `count` buckets of shared memory."""
    for part, chosen in enumerate(np.array_split(np.array(list(tensors)), count)):
        infos = manifest({str(name): tensors[str(name)] for name in chosen})
        flat = sender.buffer(part, sum(info.nbytes for info in infos))
        for name, view in views(flat, infos):
            view.copy_(tensors[name])
        yield Bucket(infos, (checksums(flat),), sender.start(part, flat, infos))


def write_model(folder: Path, **settings: Any) -> Path:
    """Write a tiny Qwen2 with distributions far from uniform and several end tokens. settings: of its
    configuration.
    """
    # Logits of about one unit: the usual initializer range of 0.02 would make all tokens equally likely, and
    # a larger one than this would amplify rounding from layer to layer.
    usual = {"vocab_size": VOCABULARY, "initializer_range": 0.12, "eos_token_id": END_TOKENS[0]}
    write_tiny_qwen2(folder, **usual | settings)
    GenerationConfig(eos_token_id=list(END_TOKENS)).save_pretrained(folder)
    return folder


def start(
    folder: Path,
    loop: asyncio.AbstractEventLoop,
    *,
    routes: bool = False,
    lora: LoraConfig | None = None,
    meeting: Meeting | None = None,
    store: TCPStore | None = None,
    **settings: Any,
) -> RealEngine:
    """settings: keys of `EngineConfig`. routes: whether requests may ask for routes. lora: of the adapter
    that updates bring. meeting, store: of an engine with further shares.
    """
    os.environ["SGLANG_RECORD_STEP_TIME"] = "1"  # tests/planning/test_simulation_real.py counts steps by it
    rule = SwitchableRule()
    config = EngineConfig.model_validate({"max_total_tokens": 50_000} | settings)
    engine = SGLangEngine(
        folder,
        "float32",
        config,
        seed=0,
        stop_rule=rule,
        routes=routes,
        lora=lora,
        meeting=meeting,
        store=store,
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return RealEngine(engine, folder, reference, rule, loop)
