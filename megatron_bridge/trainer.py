"""One rank of the trainer: log-probs, optimizer steps and weights of packed forests, by Megatron-Core.

A plain class: whoever owns the processes makes one per rank, and calls every method on all ranks at once.
"""

import megatron_bridge.runtime  # noqa: F401  # isort: skip  # before anything of Megatron-Core

import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there
from torch.nn.functional import linear

from megatron_bridge import optimizer
from megatron_bridge.architecture import check_layout, read_architecture
from megatron_bridge.checkpoint import Checkpointer
from megatron_bridge.log_prob import token_log_probs
from megatron_bridge.model import build_model
from megatron_bridge.process_groups import form_groups
from megatron_bridge.reference import ReferenceWeights
from megatron_bridge.runtime import on_device as _on_device
from megatron_bridge.schedule import MicroBatch, Schedule
from megatron_bridge.weight_transfer import WeightExporter, load_weights
from treepo.config.learning import LearningConfig
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.learning.loss import policy_loss, summarise
from treepo.learning.packing import Pack
from treepo.training.checkpoint_manifest import CheckpointManifest
from treepo.weight_sync.wire import Manifest

REDUCTIONS: dict[str, Callable[..., float]] = {"sum": math.fsum, "max": max, "min": min}


class MegatronTrainer:
    """One rank of tensor x data x pipeline, counted in this order, tensor fastest.

    folder: a Hugging Face model. dtype: of parameters and activations; master weights, gradients and
    softmax are float32. store: where the ranks meet (`create_store`). Raises ConfigError where the layout
    does not divide the model, ModelError where the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        config: TrainerConfig,
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
            chunks = build_model(self._architecture, self._dtype, config)
            chunks = [chunk.to(self._device, self._dtype) for chunk in chunks]
            load_weights(folder, chunks, self._architecture)
            self._model, self._optimizer = optimizer.trainable(chunks, config, self._dtype)
            self._exporter = WeightExporter(chunks, self._architecture, self._dtype, self._device)
            self._reference = ReferenceWeights(chunks) if learning.kl_coefficient else None
            self._checkpointer = Checkpointer(
                self._model, self._optimizer, folder, config.parallel.model_dump()
            )
        self._schedule = Schedule(self._model, self._architecture, config.parallel, self._dtype, self._device)

    def log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """For each pack of this rank's replica float32 [T], 0 where `source` is -1."""
        length = [len(pack.token) for pack in packs]
        with _on_device(), torch.no_grad():
            results = self._schedule.run(
                packs,
                scored=lambda pack: pack.source >= 0,
                forward=lambda batch, chunk: self._forward(batch, chunk, temperature, with_entropy=False),
                finish=lambda _, scores: scores[0],
                train=False,
            )
            if not packs:
                return []
            flat = torch.empty(sum(length), device=self._device)
            if parallel_state.is_pipeline_last_stage():
                # What was added to fill up the batch or a pack is left out.
                parts = [result[:tokens] for result, tokens in zip(results, length, strict=False)]
                torch.cat(parts, out=flat)
            dist.broadcast(
                flat,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                self._groups.pp,
            )
        return np.split(flat.cpu().numpy(), np.cumsum(length[:-1]))

    def reference_log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """As `log_probs`, under the weights that training began with; for `kl_coefficient` above 0."""
        assert self._reference is not None, "the trainer was built without a reference"
        with self._reference.in_place():
            return self.log_probs(packs, temperature)

    def train_step(self, packs: Sequence[Pack], temperature: float, denominator: float) -> dict[str, float]:
        """One optimizer step; `packs` are this replica's, and replicas may have unequal numbers of them.

        The gradient is that of the summed token loss of all replicas' packs over `denominator`, divided by
        nothing else. Returns the metrics of `treepo.learning.loss`, `grad_norm` (before clipping) and `learning_rate`.
        Raises FloatingPointError, on all ranks, where the gradient is not finite: nothing is changed then.
        """
        assert denominator > 0, denominator

        def loss(batch: MicroBatch, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            log_prob, entropy = scores
            return policy_loss(log_prob, batch.pack, self._learning, denominator, entropy)

        with _on_device():
            for chunk in self._model:
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            metrics = self._schedule.run(
                packs,
                scored=lambda pack: pack.count_pos + pack.count_neg > 0,
                forward=lambda batch, chunk: self._forward(batch, chunk, temperature, with_entropy=True),
                finish=loss,
                train=True,
            )
            finalize_model_grads(list(self._model))
            learning_rate = self._schedule_rate()
            grad_norm = optimizer.step(self._optimizer)
            self._step += 1
        return summarise(_reduced(metrics)) | {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def release_cache(self) -> None:
        """Give the device's memory back that torch keeps for later; what is in use stays."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def manifest(self) -> Manifest:
        """All tensors of the model, in the order of `tensors`; the same on every rank."""
        return self._exporter.manifest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors under their Hugging Face names: on rank 0 only, but every rank iterates."""
        return self._exporter.tensors()

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder for transformers and SGLang. Raises ModelError where it exists."""
        self._exporter.write(self._folder, folder)

    def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Begin to write a training checkpoint (`treepo.training.checkpoint_manifest`), with the run's own `run`; return
        when the state is copied. It is there when `finish_save` returns. Raises CheckpointError.
        """
        dtype = str(self._dtype).removeprefix("torch.")
        layout = self._config.parallel.model_dump()
        with _on_device():
            self._checkpointer.save(folder, CheckpointManifest(dtype, True, self._step, layout, run))

    def finish_save(self) -> None:
        """The checkpoint that was begun, if any, is complete. Raises CheckpointError where it cannot be."""
        self._checkpointer.finish()

    def load(self, folder: Path) -> None:
        """Go on from a training checkpoint, of any layout; the reference stays. Raises ModelError."""
        with _on_device():
            self._step = self._checkpointer.load(folder).optimizer_steps

    def close(self) -> None:
        """Leave the process groups; the process may end or make another trainer."""
        self._checkpointer.close()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    def _forward(
        self, batch: MicroBatch, chunk: DistributedDataParallel, temperature: float, with_entropy: bool
    ) -> Tensor:
        """The last stage's scores, float32 [1 or 2, T]: log-probs and entropies, 0 where not wanted. The
        hidden states of any other stage.
        """

        def score(hidden_states: Tensor, output_layer, output_weight: Tensor | None, **_: object) -> Tensor:
            weight = output_layer.weight if output_weight is None else output_weight
            states = self._whole(hidden_states)[:, 0]
            source, target = (batch.pack[name].index_select(0, batch.scored) for name in ("source", "token"))
            log_prob, entropy = token_log_probs(
                states.index_select(0, source),
                lambda rows: linear(rows, weight),
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
            everywhere = wanted.new_zeros(len(wanted), len(states))
            return everywhere.index_copy(1, batch.scored, wanted)

        return chunk(
            input_ids=batch.pack["token"][None].long(),
            position_ids=None,  # the attention's plan has the positions
            attention_mask=None,
            extra_block_kwargs={"attention_bias": batch.plan},
            output_processor=score,
        )

    def _whole(self, hidden_states: Tensor) -> Tensor:
        """All tokens' hidden states on every tensor-parallel rank, of which each then makes its part of the
        logits: the gradient is the sum of the ranks'.
        """
        if self._config.parallel.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)

    def _schedule_rate(self) -> float:
        """Set the learning rate of the step that is about to be taken."""
        config = self._config.optimizer
        rate = config.learning_rate * min(1.0, (self._step + 1) / max(1, config.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        return rate


def create_store(host: str = "127.0.0.1") -> TCPStore:
    """The ranks' rendezvous, owned by rank 0 and listening on `host` at a port that the system chose (its
    `port`); the others connect with `TCPStore(host, port, is_master=False)`.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _join(parallel: ParallelConfig, rank: int, world_size: int, store: Store) -> None:
    """Join the other ranks and form the parallel groups."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    form_groups(parallel)


def _reduced(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics over all micro-batches and replicas; a key's last part says how they are reduced."""
    reports = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    mine = [{key: float(value) for key, value in entry.items()} for entry in metrics] if reports else []
    everyone: list[list[dict[str, float]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    entries = list(chain.from_iterable(everyone))
    return {key: REDUCTIONS[key.rsplit("_", 1)[1]](entry[key] for entry in entries) for key in entries[0]}
