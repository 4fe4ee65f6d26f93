"""One rank of the Megatron-Core trainer: log-probs, optimizer steps, checkpoints and weights.

It knows no Ray: the process of each rank constructs one, and every method is called on all ranks at once.
"""

import megatron_bridge.runtime  # noqa: F401  # isort: skip  # before anything of Megatron-Core

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
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

from megatron_bridge import optimizer, progress
from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.adapters import adapters_of, add_adapters
from megatron_bridge.architecture import (
    check_adapters,
    check_layout,
    check_routing_replay,
    read_architecture,
)
from megatron_bridge.checkpoint import Checkpointer
from megatron_bridge.host_memory import DeviceMemory
from megatron_bridge.log_prob import token_log_probs
from megatron_bridge.model import build_model
from megatron_bridge.process_groups import form_groups, leave_groups
from megatron_bridge.reference import ReferenceWeights, WithoutAdapters
from megatron_bridge.routing_replay import RoutingReplay, own_choice_differs
from megatron_bridge.runtime import on_device
from megatron_bridge.schedule import MicroBatch, Schedule
from megatron_bridge.step_metrics import log_prob_mismatch, own_loss, reduced
from megatron_bridge.warm_up import warm_up_packs
from megatron_bridge.weight_check import CHECKED_TOKENS, weight_check
from megatron_bridge.weight_source import WeightSource
from megatron_bridge.weight_transfer import WeightExporter, load_weights
from treepo.config.learning import LearningConfig
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.errors import TrainerError
from treepo.learning.loss import policy_loss, summarise
from treepo.learning.packing import Pack, head
from treepo.learning.soundness import WeightCheck
from treepo.protocols import BatchResult, was_taken
from treepo.training.checkpoint_manifest import AdapterManifest, CheckpointManifest
from treepo.weight_sync.lanes import MOST_LANES
from treepo.weight_sync.listening_store import listening_store
from treepo.weight_sync.wire import Manifest

PATIENCE = timedelta(minutes=30)
"""The longest that a rank waits for another in a collective, and for a communicator to be opened: stages
compile their kernels in turn."""


class MegatronTrainer:
    """One rank of tensor x context x data x pipeline, numbered with tensor fastest.

    folder: a Hugging Face model. dtype: of parameters and activations; master weights, gradients and softmax
    are float32. store: where the ranks find each other (`create_store`). sends_adapter: whether engines get
    the adapters alone. Raises ConfigError if the layout
    does not divide the model, ModelError if the folder cannot be used.
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
        *,
        sends_adapter: bool = False,
    ) -> None:
        assert world_size == config.parallel.ranks, f"{world_size} ranks for {config.parallel}"
        self._config, self._learning, self._folder = config, learning, folder
        self._architecture = read_architecture(folder)
        check_layout(self._architecture, config.parallel)
        check_routing_replay(folder, self._architecture, config.routing_replay)
        check_adapters(folder, self._architecture, config.lora)
        self._dtype = getattr(torch, dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._step = 0
        with on_device():
            _join(config.parallel, rank, world_size, store)
            self._groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp"])
            chunks = build_model(self._architecture, self._dtype, config)
            chunks = [chunk.to(self._device, self._dtype) for chunk in chunks]
            load_weights(folder, chunks, self._architecture)
            if config.lora is not None:
                add_adapters(chunks, self._architecture, config.lora, self._device)
            replay = None
            if config.routing_replay != "none":
                sequence_parallel = config.parallel.sequence_parallel
                replay = RoutingReplay(chunks, self._architecture, config.routing_replay, sequence_parallel)
            self._model, self._optimizer = optimizer.trainable(chunks, config, self._dtype)
            self._learning_rate = optimizer.LearningRate(self._optimizer, config)
            exporter = partial(WeightExporter, chunks, self._architecture, self._dtype, self._device)
            self._exporter = exporter(self._architecture.weight_rules())
            self._adapter_exporter = None
            if config.lora is not None:
                self._adapter_exporter = exporter(adapter_rules(self._architecture, config.lora.targets))
            self._served = self._exporter
            if sends_adapter:
                assert self._adapter_exporter is not None, "weights.send = adapter without trainer.lora"
                self._served = self._adapter_exporter
            self._memory = DeviceMemory(self._model, self._optimizer, config.offload)
            self._sources: dict[tuple[int, bool], WeightSource] = {}
            self._reference = None
            if learning.kl_coefficient and config.lora is not None:
                self._reference = WithoutAdapters([adapter for _, adapter in adapters_of(chunks)])
            elif learning.kl_coefficient:
                self._reference = ReferenceWeights(self._memory.weights)
            self._adapters = None if config.lora is None else AdapterManifest.of(config.lora, folder)
            self._checkpointer = Checkpointer(
                self._model, self._optimizer, folder, config.parallel.model_dump(), self._adapters
            )
        self._schedule = Schedule(
            self._model, self._architecture, config.parallel, self._dtype, self._device, replay
        )

    def log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """Compute float32 [T] for each of this replica's packs, 0 if `source` is -1; on every rank."""
        return self._log_probs_of(packs, temperature, replay=True)

    def reference_log_probs(self, packs: Sequence[Pack], temperature: float) -> list[np.ndarray]:
        """As `log_probs`, under the weights that training began with, whose routers choose the experts; needs
        a `kl_coefficient` above 0.
        """
        assert self._reference is not None, "the trainer was built without a reference"
        with self._reference.in_place():
            return self._log_probs_of(packs, temperature, replay=False)

    def train_batch(
        self, mini_batches: Sequence[tuple[Sequence[Pack], float]], temperature: float
    ) -> BatchResult:
        """Take one optimizer step for each mini-batch: this replica's packs, and the denominator.

        First the log-probs of all trained tokens are computed under the current weights, and under the
        reference weights if the loss has a KL term; they, the attention plans and the routes stay on the
        device until the last step. At the end the new weights are measured on the last mini-batch that
        changed them. Returns the same on every rank.
        """
        start = time.perf_counter()
        with on_device():
            packs = [self._schedule.filled_up(part) for part, _ in mini_batches]
            batches = [[self._schedule.prepare(pack, _trained(pack)) for pack in part] for part in packs]
            every = list(chain.from_iterable(batches))
            self._attach("old_log_prob", every, temperature)
            differs = self._own_choice_differs(every, "rollout")
            if self._reference is not None and self._learning.kl_in == "loss":
                with self._reference.in_place():
                    own_choice = [batch.without_routes() for batch in every]
                    self._attach("reference_log_prob", own_choice, temperature)
            mismatch = log_prob_mismatch(list(chain.from_iterable(packs)), every)
            computed = time.perf_counter()
            updates = [
                self._update(part, len(part), temperature, denominator)
                for part, (_, denominator) in zip(batches, mini_batches, strict=True)
            ]
            if differs is None:
                differs = self._own_choice_differs(every, "trainer")
            taken = [index for index, update in enumerate(updates) if was_taken(update)]
            weights = None
            if taken:
                weights = self._weight_check(mini_batches[taken[-1]][0], batches[taken[-1]], temperature)
        seconds = {"log_probs": computed - start, "train": time.perf_counter() - computed}
        return BatchResult(updates, mismatch, seconds, weights, differs)

    def train_step(self, packs: Sequence[Pack], temperature: float, denominator: float) -> dict[str, float]:
        """Take one optimizer step on this replica's packs, which carry their old log-probs; replicas may have
        unequal numbers of packs.

        The gradient is that of the summed token loss of all replicas' packs over `denominator`, divided by
        nothing else. Returns the metrics of `treepo.learning.loss`, `grad_norm` (before clipping) and
        `learning_rate`. If the loss or the gradient is not finite, neither is `grad_norm`, and nothing
        changes on any rank: neither weights nor optimizer state, and the learning rate's warm-up does not
        count the step.
        """
        with on_device():
            filled = self._schedule.filled_up(packs)
            batches = (self._schedule.prepare(pack, _trained(pack)) for pack in filled)
            return self._update(batches, len(filled), temperature, denominator)

    def warm_up(self, lanes: int = MOST_LANES, one_host: bool = False) -> None:
        """Compute the gradient of full packs and forget it, and gather the weights as for a sync by
        `weight_source(lanes, one_host)`. Collective.

        Kernels are compiled and communicators opened before anything waits for them, and the device's memory
        is at its peak before engines measure what is free. Raises TrainerError if a full pack does not fit.
        """
        # A CPU compiles nothing, and engines do not wait for its memory.
        tokens = self._config.max_tokens_per_pack if torch.cuda.is_available() else 2
        try:
            for packs in warm_up_packs(tokens, self._config.parallel.pipeline):
                self.log_probs(packs, 1.0)
                with on_device():
                    batches = (self._schedule.prepare(pack, _trained(pack)) for pack in packs)
                    self._compute_gradient(batches, len(packs), 1.0, 1.0)
                    optimizer.gradient_norm(self._optimizer, torch.zeros((), device=self._device))
        except torch.OutOfMemoryError as error:
            raise TrainerError(
                f"a pack of trainer.max_tokens_per_pack = {tokens} tokens does not fit on the device "
                f"({str(error).splitlines()[0]}); a smaller pack, trainer.recompute = full or more ranks "
                "(trainer.parallel) take less"
            ) from None
        for _ in self.weight_source(lanes, one_host).rounds(1):
            pass
        self.release_cache()

    def offload(self, weights: bool) -> None:
        """Give the device to engines: free the gradients, copy to the host what `trainer.offload` says, and
        return torch's cache. weights: whether that may include the weights.

        Weights and optimizer state can still be read, saved and loaded; `reload` precedes any computation.
        """
        with on_device():
            self._memory.give_back(weights)
        self.release_cache()

    def reload(self) -> None:
        """Undo `offload`."""
        with on_device():
            self._memory.take()

    def release_cache(self) -> None:
        """Return the device memory that torch caches to the device; memory in use stays."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def manifest(self) -> Manifest:
        """List what engines get, in the order of `tensors`; the same on every rank."""
        return self._served.manifest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what engines get on rank 0, the model's tensors under their Hugging Face names or its
        adapters under PEFT's; every rank must iterate.
        """
        with self._memory.weights.readable():
            yield from self._served.tensors()

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every A and B of the adapters under PEFT's names on rank 0; every rank must iterate. Nothing
        without `trainer.lora`.
        """
        if self._adapter_exporter is None:
            return
        with self._memory.weights.readable():
            yield from self._adapter_exporter.tensors()

    def weight_source(self, lanes: int = MOST_LANES, one_host: bool = False) -> WeightSource:
        """What engines get, as at most `lanes` ranks send it. Called on all ranks.

        one_host: whether all of these must be on rank 0's host.
        """
        key = lanes, one_host
        if key not in self._sources:
            readable = self._memory.weights.readable
            self._sources[key] = WeightSource(self._served, readable, lanes, one_host)
        return self._sources[key]

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder for transformers and SGLang, with adapters merged, and in it those by
        themselves as PEFT's folder `adapter`. Raises ModelError if it exists.
        """
        with self._memory.weights.readable():
            self._exporter.write(self._folder, folder, self._config.lora, self._adapter_exporter)

    def save(self, folder: Path, run: Mapping[str, Any], ready_trees: bytes = b"") -> None:
        """Begin a training checkpoint (`treepo.training.checkpoint_manifest`) whose manifest holds `run`.

        ready_trees: on rank 0, the content of the file of this name. Returns once the state is copied;
        `finish_save` completes the checkpoint. Raises CheckpointError.
        """
        dtype = str(self._dtype).removeprefix("torch.")
        layout = self._config.parallel.model_dump()
        with on_device(), self._memory.weights.readable():
            manifest = CheckpointManifest(dtype, True, self._step, layout, run, adapters=self._adapters)
            self._checkpointer.save(folder, manifest, ready_trees)

    def save_written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that was begun, or has failed to."""
        return self._checkpointer.written

    def finish_save(self) -> None:
        """Wait until a checkpoint that was begun is complete. Raises CheckpointError if it cannot be."""
        self._checkpointer.finish()

    def load(self, folder: Path) -> None:
        """Restore a training checkpoint of any layout; the reference weights stay. Raises ModelError."""
        with on_device(), self._memory.weights.readable():
            self._step = self._checkpointer.load(folder).optimizer_steps

    def close(self) -> None:
        """Leave the process groups; afterwards the process may make another trainer."""
        self._checkpointer.close()
        leave_groups()

    def _log_probs_of(self, packs: Sequence[Pack], temperature: float, replay: bool) -> list[np.ndarray]:
        """`log_probs`. replay: whether routers take the routes of the packs, if these are replayed."""
        lengths = [len(pack) for pack in packs]
        with on_device():
            filled = self._schedule.filled_up(packs)
            batches = (self._schedule.prepare(pack, pack.source >= 0, replay=replay) for pack in filled)
            results = self._log_probs(batches, len(filled), temperature)
            if not packs:
                return []
            flat = torch.empty(sum(lengths), device=self._device)
            if parallel_state.is_pipeline_last_stage():
                # Blank packs and padding are left out.
                parts = [result[:tokens] for result, tokens in zip(results, lengths, strict=False)]
                torch.cat(parts, out=flat)
            dist.broadcast(flat, parallel_state.get_pipeline_model_parallel_last_rank(), self._groups.pp)
        return np.split(flat.cpu().numpy(), np.cumsum(lengths[:-1]))

    def _log_probs(self, batches: Iterable[MicroBatch], number: int, temperature: float) -> list[Tensor]:
        """Float32 [T] for each micro-batch, 0 on tokens that are not wanted; only on the last stage."""
        with torch.no_grad():
            return self._schedule.run(
                batches,
                number,
                forward=lambda batch, chunk: self._forward(batch, chunk, temperature),
                finish=lambda _, outputs: outputs[0],
                train=False,
            )

    def _attach(self, field: str, batches: Sequence[MicroBatch], temperature: float) -> None:
        """Compute log-probs and keep them as `field` of each micro-batch, on the stage that has the loss."""
        values = self._log_probs(batches, len(batches), temperature)
        if parallel_state.is_pipeline_last_stage():
            for batch, value in zip(batches, values, strict=True):
                batch.pack[field] = value

    def _own_choice_differs(self, batches: Sequence[MicroBatch], mode: str) -> float | None:
        """`own_choice_differs` of the last pass, if `trainer.routing_replay` is `mode`."""
        if self._config.routing_replay != mode:
            return None
        return own_choice_differs((batch.plan.routes for batch in batches), self._device)

    def _update(
        self, batches: Iterable[MicroBatch], number: int, temperature: float, denominator: float
    ) -> dict[str, float]:
        """Take the optimizer step of `train_step`."""
        metrics = self._compute_gradient(batches, number, temperature, denominator)
        learning_rate = self._learning_rate.set(self._step)
        grad_norm = optimizer.step(self._optimizer, own_loss(metrics, self._device))
        if math.isfinite(grad_norm):
            self._step += 1
        progress.count()
        return summarise(reduced(metrics)) | {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def _weight_check(
        self, packs: Sequence[Pack], trained: Sequence[MicroBatch], temperature: float
    ) -> WeightCheck:
        """Measure the weights on the first trained tokens of this replica's packs. trained: made of them."""
        filled = self._schedule.filled_up([head(pack, CHECKED_TOKENS) for pack in packs[:1]])
        batches = [self._schedule.prepare(pack, _trained(pack)) for pack in filled]
        log_probs = self._log_probs(batches, len(batches), temperature)
        return weight_check(self._model, batches, log_probs, trained, self._device)

    def _compute_gradient(
        self, batches: Iterable[MicroBatch], number: int, temperature: float, denominator: float
    ) -> list[dict[str, Tensor]]:
        """Compute the gradient of all replicas' packs, and the metrics of each of this replica's; those are
        empty before the last stage.
        """
        assert denominator > 0, denominator

        def loss(batch: MicroBatch, outputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            log_prob, entropy = outputs
            return policy_loss(log_prob, batch.pack, self._learning, denominator, entropy, self._step)

        for chunk in self._model:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        metrics = self._schedule.run(
            batches,
            number,
            forward=lambda batch, chunk: self._forward(batch, chunk, temperature),
            finish=loss,
            train=True,
        )
        finalize_model_grads(list(self._model))
        return metrics

    def _forward(self, batch: MicroBatch, chunk: DistributedDataParallel, temperature: float) -> Tensor:
        """Return the last stage's log-probs and entropies: float32 [2, T], 0 on tokens that are not wanted.
        Return the hidden states of any other stage.

        The ranks of a context group return the same, of the whole pack. Gradients flow only to the tokens
        that a rank has computed, so the ranks' gradients add up to those of the pack.
        """

        def log_probs(
            hidden_states: Tensor, output_layer, output_weight: Tensor | None, **_: object
        ) -> Tensor:
            weight = output_layer.weight if output_weight is None else output_weight
            states = self._whole(hidden_states)[:, 0]
            log_prob, entropy = token_log_probs(
                states.index_select(0, batch.source),
                weight,
                batch.pack["token"].index_select(0, batch.wanted).long(),
                temperature,
                self._architecture.dimensions.vocabulary,
                self._groups.tp,
            )
            if not self._learning.entropy_coefficient:  # a metric, cheap unless a gradient flows through it
                entropy = entropy.detach()
            wanted = torch.stack([log_prob, entropy])
            everywhere = wanted.new_zeros(len(wanted), len(batch.pack["token"]))
            mine = everywhere.index_copy(1, batch.wanted, wanted)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(mine, group=self._groups.cp)

        progress.count()  # of what came before this micro-batch
        return chunk(
            input_ids=batch.token[None].long(),
            position_ids=None,  # the attention's plan has the positions
            attention_mask=None,
            extra_block_kwargs={"attention_bias": batch.plan},
            output_processor=log_probs,
        )

    def _whole(self, hidden_states: Tensor) -> Tensor:
        """Gather all tokens' hidden states on every tensor-parallel rank. Each computes its part of the
        logits from them, so the gradient is the sum of the ranks'.
        """
        if self._config.parallel.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)


def create_store(host: str = "127.0.0.1") -> TCPStore:
    """Open the store through which the ranks find each other, on `host` at a port that the system chooses
    (its `port`). Called on rank 0.

    The other ranks connect with `join_store`.
    """
    return listening_store(host, PATIENCE)


def join_store(host: str, port: int) -> TCPStore:
    """Connect to the store that rank 0 has opened."""
    return TCPStore(host, port, None, False, PATIENCE)


def _join(parallel: ParallelConfig, rank: int, world_size: int, store: Store) -> None:
    """Join the other ranks and form the parallel groups."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    form_groups(parallel)


def _trained(pack: Pack) -> np.ndarray:
    return pack.count_pos + pack.count_neg > 0
