"""One rank of the trainer: log-probs, optimizer steps and weights of packed forests, by Megatron-Core.

A plain class: whoever owns the processes makes one per rank, and calls every method on all ranks at once.
"""

import math
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from megatron_bridge.architecture import check_layout, read_architecture
from megatron_bridge.attention import AttentionPlan, plan_attention
from megatron_bridge.log_prob import token_log_probs
from megatron_bridge.model import build_model
from megatron_bridge.reference import ReferenceWeights
from megatron_bridge.transfer import Exporter, load
from treepo.config.actor import ActorConfig, ParallelConfig
from treepo.config.learning import LearningConfig
from treepo.loss import policy_loss, summarise
from treepo.packing import Pack
from treepo.transport.wire import Manifest

REDUCTIONS: dict[str, Callable[..., float]] = {"sum": math.fsum, "max": max, "min": min}


@dataclass(frozen=True, slots=True, eq=False)
class _MicroBatch:
    """A pack on the device. scored: int64 [N], the tokens whose log-probs are wanted."""

    pack: dict[str, Tensor]
    plan: AttentionPlan
    scored: Tensor


class MegatronActor:
    """One rank of tensor x data x pipeline, counted in this order, tensor fastest.

    folder: a Hugging Face model. dtype: of parameters and activations; master weights, gradients and
    softmax are float32. store: where the ranks meet (`create_store`). Raises ConfigError where the layout
    does not divide the model, ModelError where the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        config: ActorConfig,
        learning: LearningConfig,
        rank: int,
        world_size: int,
        store: Store,
    ) -> None:
        assert world_size == config.parallel.ranks, f"{world_size} ranks for {config.parallel}"
        self._config, self._learning, self._folder = config, learning, folder
        self._architecture = read_architecture(folder)
        check_layout(self._architecture, config.parallel)
        self._dtype = getattr(torch, dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._step = 0
        with _on_device():
            _join(config.parallel, rank, world_size, store)
            self._groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp"])
            model = build_model(self._architecture, self._dtype, config).to(self._device, self._dtype)
            load(folder, model, self._architecture)
            self._model, self._optimizer = _trainable(model, config, self._dtype)
            self._exporter = Exporter(model, self._architecture, self._dtype, self._device)
            self._reference = ReferenceWeights(model) if learning.kl_coefficient else None

    def log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """For each pack of this rank's replica float32 [T], 0 where `source` is -1."""
        if not packs:
            return []
        batches = (self._micro_batch(pack, pack.source >= 0) for pack in packs)
        with _on_device(), torch.no_grad():
            results = self._schedule(
                batches, len(packs), temperature, lambda _, scores: scores[0], train=False
            )
            flat = torch.empty(sum(len(pack.token) for pack in packs), device=self._device)
            if parallel_state.is_pipeline_last_stage():
                torch.cat(results, out=flat)
            dist.broadcast(
                flat,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                self._groups.pp,
            )
        ends = np.cumsum([len(pack.token) for pack in packs])
        return np.split(flat.cpu().numpy(), ends[:-1])

    def reference_log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """As `log_probs`, under the weights that training began with; for `kl_coefficient` above 0."""
        assert self._reference is not None, "the actor was built without a reference"
        with self._reference.in_place():
            return self.log_probs(packs, temperature)

    def train_step(self, packs: Sequence[Pack], temperature: float, denominator: float) -> dict[str, float]:
        """One optimizer step; `packs` are this replica's, and replicas may have unequal numbers of them.

        The gradient is that of the summed token loss of all replicas' packs over `denominator`, divided by
        nothing else. Returns the metrics of `treepo.loss`, `grad_norm` (before clipping) and
        `learning_rate`. Raises FloatingPointError where the gradient is not finite.
        """
        assert denominator > 0, denominator

        def loss(batch: _MicroBatch, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            log_prob, entropy = scores
            return policy_loss(log_prob, batch.pack, self._learning, denominator, entropy)

        batches = (self._micro_batch(pack, pack.count_pos + pack.count_neg > 0) for pack in packs)
        with _on_device():
            self._model.zero_grad_buffer()
            self._optimizer.zero_grad()
            metrics = self._schedule(batches, len(packs), temperature, loss, train=True)
            finalize_model_grads([self._model])
            learning_rate = self._schedule_rate()
            _, grad_norm, _ = self._optimizer.step()  # type: ignore[misc]  # left untyped by its base class
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"optimizer step {self._step}: the gradient's norm is {grad_norm}")
        return summarise(_reduced(metrics)) | {"grad_norm": float(grad_norm), "learning_rate": learning_rate}

    def manifest(self) -> Manifest:
        """All tensors of the model, in the order of `tensors`; the same on every rank."""
        return self._exporter.manifest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors under their Hugging Face names: on rank 0 only, but every rank iterates."""
        return self._exporter.tensors()

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder for transformers and SGLang. Raises ModelError where it exists."""
        self._exporter.write(self._folder, folder)

    def close(self) -> None:
        """Leave the process groups; the process may end or make another actor."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    def _micro_batch(self, pack: Pack, scored: np.ndarray) -> _MicroBatch:
        plan = plan_attention(
            pack.exit, pack.position, self._architecture.frequency, self._dtype, self._device
        )
        # Copies: arrays that come from another process may be read-only, and tensors cannot be.
        tensors = {name: torch.tensor(column, device=self._device) for name, column in pack.columns().items()}
        return _MicroBatch(tensors, plan, torch.from_numpy(np.flatnonzero(scored)).to(self._device))

    def _schedule(
        self,
        batches: Iterator[_MicroBatch],
        count: int,
        temperature: float,
        finish: Callable,
        train: bool,
    ) -> list:
        """Run the micro-batches through the pipeline. On the last stage `finish(batch, scores)` is called on
        each one's scores: where training it returns the loss and what to collect, otherwise only the latter.
        Returns what was collected: nothing on the other stages.
        """
        if not count:
            return []

        def forward_step(batches: Iterator[_MicroBatch], model: DistributedDataParallel):
            batch = next(batches)
            output = self._forward(batch, model, temperature, with_entropy=train)

            def collect(scores: Tensor, non_loss_data: bool = False):
                if non_loss_data:
                    return finish(batch, scores)
                loss, metrics = finish(batch, scores)
                tokens = torch.zeros((), dtype=torch.int, device=self._device)  # unused: no hidden mean
                return loss, tokens, metrics

            return output, collect

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self._model],
            num_microbatches=count,
            seq_length=1,  # unused: lengths vary and are sent along
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def _forward(
        self, batch: _MicroBatch, model: DistributedDataParallel, temperature: float, with_entropy: bool
    ) -> Tensor:
        """The last stage's scores, float32 [1 or 2, T]: log-probs and entropies, 0 where not wanted. The
        hidden states of any other stage.
        """

        def score(hidden_states: Tensor, output_layer, output_weight: Tensor | None, **_: object) -> Tensor:
            def project(rows: Tensor) -> Tensor:
                return output_layer(rows[:, None], weight=output_weight)[0][:, 0]

            source, target = (batch.pack[name].index_select(0, batch.scored) for name in ("source", "token"))
            log_prob, entropy = token_log_probs(
                hidden_states[:, 0].index_select(0, source),
                project,
                target.long(),
                temperature,
                self._architecture.dimensions.vocabulary,
                self._groups.tp,
                with_entropy,
            )
            scores = [log_prob]
            if entropy is not None:  # cheap unless a gradient flows through it
                scores.append(entropy if self._learning.entropy_coefficient else entropy.detach())
            wanted = torch.stack(scores)
            everywhere = wanted.new_zeros(len(wanted), len(hidden_states))
            return everywhere.index_copy(1, batch.scored, wanted)

        return model(
            input_ids=batch.pack["token"][None].long(),
            position_ids=None,  # the attention's plan has the positions
            attention_mask=None,
            extra_block_kwargs={"attention_bias": batch.plan},
            output_processor=score,
        )

    def _schedule_rate(self) -> float:
        """Set the learning rate of the step that is about to be taken."""
        optimizer = self._config.optimizer
        self._step += 1
        rate = optimizer.learning_rate * min(1.0, self._step / max(1, optimizer.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
        return rate


def create_store(host: str = "127.0.0.1") -> TCPStore:
    """The ranks' rendezvous, owned by rank 0 and listening on `host` at a port that the system chose (its
    `port`); the others connect with `TCPStore(host, port, is_master=False)`.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _on_device() -> AbstractContextManager:
    """To be entered around Megatron-Core: without CUDA, its CUDA calls are served by the CPU."""
    if torch.cuda.is_available():
        return nullcontext()
    from megatron_bridge import cpu  # it replaces functions of torch.cuda: not where there is CUDA

    cpu.install()
    return cpu.CudaAsCpu()


def _join(parallel: ParallelConfig, rank: int, world_size: int, store: Store) -> None:
    """Join the other ranks and form the parallel groups."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # Megatron-Core insists; nothing random is left


def _trainable(
    model: GPTModel, config: ActorConfig, dtype: torch.dtype
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Wrap the model for gradient accumulation in float32, and make its optimizer: master weights in
    float32, sharded over the replicas where there are several.
    """
    sharded = config.parallel.data > 1
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded),
        model,
    )
    optimizer = config.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
    )
    return wrapped, get_megatron_optimizer(settings, [wrapped])


def _reduced(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics over all micro-batches and replicas; a key's last part says how they are reduced."""
    reports = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    mine = [{key: float(value) for key, value in entry.items()} for entry in metrics] if reports else []
    everyone: list[list[dict[str, float]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    entries = list(chain.from_iterable(everyone))
    return {key: REDUCTIONS[key.rsplit("_", 1)[1]](entry[key] for entry in entries) for key in entries[0]}
