"""Saves and loads training checkpoints: everything that the next optimizer step depends on, at any layout.

The format is Megatron-Core's distributed checkpoint (`torch_dist`): its tensors are pieces of the whole
model's, so the ranks that load may be arranged differently from the ranks that saved. The optimizer's
settings are not saved; they come from the configuration.

Saving copies the state to host memory, and a thread writes it while training goes on. Megatron-Core would
write from a forked process, which is unsafe beside its own threads and Ray's, and would hide why a write
fails.
"""

import errno
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_bridge.adapters import sharded_adapters
from megatron_bridge.architecture import check_same_model
from megatron_bridge.atomic_folder import (
    abort_folder,
    begin_folder,
    commit_folder,
    partial_folder,
    reason_and_file,
)
from megatron_bridge.checked_writer import CheckedWriter, read_back
from megatron_bridge.checkpoint_pickles import without_code
from megatron_bridge.distributed_checkpoint import (
    COMMON_STATE,
    EXTRA_STATE,
    READ_FAILURES,
    declare_format,
    sharded_parameters,
    unreadable,
)
from megatron_bridge.hf_folder import copy_model_files
from megatron_bridge.host_memory import return_free_memory
from megatron_bridge.optimizer_state import set_step_count, sharded_optimizer_state
from megatron_bridge.process_groups import on_first_rank
from treepo.errors import CheckpointError, ModelError
from treepo.training.checkpoint_manifest import (
    HUGGING_FACE,
    READY_TREES,
    TRAINER,
    AdapterManifest,
    CheckpointManifest,
    read_manifest,
)

_LONGEST_WRITE = timedelta(hours=6)  # ranks with nothing to write wait this long for the others


@dataclass(frozen=True, slots=True)
class _Writing:
    """A checkpoint that is being written."""

    folder: Path
    manifest: CheckpointManifest
    done: Future[dict[str, str]]


class Checkpointer:
    """Saves and loads one rank's part of `chunks` and their optimizer. Every method is collective,
    unless it says otherwise.

    model: the Hugging Face folder whose config, tokenizer and generation config each checkpoint gets. layout:
    the ranks' arrangement, as the manifest records it. adapters: if those alone are trained, and so saved.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        model: Path,
        layout: Mapping[str, int],
        adapters: AdapterManifest | None,
    ) -> None:
        self._chunks, self._optimizer, self._model, self._layout = chunks, optimizer, model, layout
        self._adapters = adapters
        # The thread has its own group, so that its messages cannot mix with the rank's own.
        self._group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None

    def save(self, folder: Path, manifest: CheckpointManifest, ready_trees: bytes) -> None:
        """Begin a checkpoint, and return when the state is copied; `finish` completes it.

        ready_trees: on rank 0, the content of the file of this name. An earlier checkpoint is finished first.
        Raises CheckpointError if that fails, or if the folder exists or cannot be made.
        """
        self.finish()
        on_first_rank(
            lambda: _begin(folder, self._model, manifest.dtype, ready_trees), f"checkpoint {folder}"
        )
        model = self._weights()
        state = {
            "model": model,
            "optimizer": sharded_optimizer_state(self._optimizer, model),
            "rng": _generators(),
        }
        for sharded in nested_values([state["model"], state["optimizer"]]):
            sharded.data = sharded.data.detach().to("cpu", copy=True)  # training changes the original
        tensors: Any = save_preprocess(state, validate_access_integrity=False)[0]
        tensors["common_state"] = replace(COMMON_STATE, replica_id=dist.get_rank())
        flat, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        done = self._thread.submit(_write, partial_folder(folder), mcore_to_pyt_state_dict(flat), self._group)
        self._writing = _Writing(folder, manifest, done)

    @property
    def written(self) -> bool:
        """Whether `finish` would not wait for this rank's thread. Not collective."""
        return self._writing is None or self._writing.done.done()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun, if any, is complete on the disk.

        Every file is read back from the disk and compared first, by the rank that wrote it. Raises the same
        CheckpointError on every rank if a rank could not write its part, or reads something else.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        what = f"checkpoint {writing.folder}"
        try:
            checksums = writing.done.result()
        except CheckpointError as error:
            if dist.get_rank() == 0:
                abort_folder(writing.folder)
            raise CheckpointError(f"{what}: {error}") from None
        on_first_rank(lambda: _commit(writing.folder, writing.manifest, checksums), what)
        return_free_memory()

    def load(self, folder: Path) -> CheckpointManifest:
        """Load model, optimizer and, at the same layout, random generators.

        A checkpoint without optimizer state leaves an optimizer that has taken no step. Raises ModelError if
        the folder is no checkpoint of this model.
        """
        manifest = read_manifest(folder)
        check_same_model(folder / HUGGING_FACE, self._model)
        self._check_adapters(folder, manifest.adapters)
        model = self._weights()
        state: dict[str, Any] = {"model": model}
        if manifest.has_optimizer:
            state["optimizer"] = sharded_optimizer_state(self._optimizer, model)
        if manifest.layout == self._layout:
            state["rng"] = _generators()
        try:
            with without_code(folder / TRAINER):
                # This reads the optimizer state into the optimizer's own memory.
                loaded: Any = dist_checkpointing.load(
                    state, str(folder / TRAINER), validate_access_integrity=False
                )
        except CheckpointException as error:
            raise unreadable(folder / TRAINER, _first_failure(error)) from None
        except (CheckpointingException, *READ_FAILURES) as error:
            raise unreadable(folder / TRAINER, error) from None
        for index, chunk in enumerate(self._chunks):
            missing, unexpected = chunk.module.load_state_dict(loaded["model"][index], strict=False)
            assert not unexpected, unexpected
            named = chunk.module.named_parameters()
            frozen = {name for name, parameter in named if not parameter.requires_grad}
            assert all(name in frozen or name.endswith(EXTRA_STATE) for name in missing), missing
        if manifest.has_optimizer:
            set_step_count(self._optimizer, manifest.optimizer_steps)
        else:
            self._optimizer.reload_model_params()
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["torch"])
            _tracker().set_states(loaded["rng"]["tensor_parallel"])
        return manifest

    def close(self) -> None:
        """End the thread. A checkpoint that was begun and not finished stays incomplete."""
        self._thread.shutdown()

    def _weights(self) -> dict[int, dict[str, Any]]:
        """Each chunk's trained parameters as sharded tensors, which share its memory."""
        sharded = sharded_parameters if self._adapters is None else sharded_adapters
        return {index: sharded(chunk.module) for index, chunk in enumerate(self._chunks)}

    def _check_adapters(self, folder: Path, saved: AdapterManifest | None) -> None:
        """Raise ModelError unless the checkpoint has what is trained here, beside the same weights."""
        ours = self._adapters
        if ours is not None and saved is not None and ours.lora == saved.lora:
            saved.check_base(self._model, folder)
        elif ours is not saved:
            has, wanted = (
                "the weights of the whole model"
                if one is None
                else f"adapters with trainer.lora = {one.lora.model_dump()}"
                for one in (saved, ours)
            )
            raise ModelError(f"{folder} has {has}, but {wanted} are trained")


def _generators() -> ShardedObject:
    """The random generators' states. No model draws random numbers today; one that does resumes exactly."""
    states = {"torch": torch.get_rng_state(), "tensor_parallel": _tracker().get_states()}
    return ShardedObject("rng", states, (dist.get_world_size(),), (dist.get_rank(),))


def _tracker() -> Any:
    """Megatron-Core's generators by name, typed as optional there."""
    return tensor_parallel.get_cuda_rng_tracker()


def _begin(folder: Path, model: Path, dtype: str, ready_trees: bytes) -> None:
    if folder.exists():
        raise FileExistsError(errno.EEXIST, "it exists, and nothing is overwritten", str(folder))
    partial = begin_folder(folder)
    try:
        (partial / TRAINER).mkdir()
        (partial / HUGGING_FACE).mkdir()
        (partial / READY_TREES).write_bytes(ready_trees)
        copy_model_files(model, partial / HUGGING_FACE, dtype)
        declare_format(partial / TRAINER)
    except OSError:
        abort_folder(folder)
        raise


def _commit(folder: Path, manifest: CheckpointManifest, checksums: Mapping[str, str]) -> None:
    """Write the manifest, check the files that are not in `checksums`, and name the folder."""
    partial = partial_folder(folder)
    try:
        written = manifest.write(partial, checksums)
        for name in written.keys() - checksums.keys():
            read_back(partial / name, written[name])
        commit_folder(folder)
    except OSError:
        abort_folder(folder)
        raise


def _write(folder: Path, state: dict[str, Any], group: Any) -> dict[str, str]:
    """Write this rank's part, and read it back. Returns the checksums of all ranks' files, by path in the
    folder. Raises CheckpointError, on every rank, with the first rank that failed and its reason.
    """
    writer = CheckedWriter(folder / TRAINER)
    try:
        save(
            state,
            storage_writer=writer,
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from None
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, writer.checksums, group)
    return {f"{TRAINER}/{name}": value for files in everyone for name, value in files.items()}


def _first_failure(error: CheckpointException) -> str:
    """The first rank that failed and its reason. Torch raises the error on every rank, with all failures."""
    rank, (cause, _) = min(error.failures.items(), key=itemgetter(0))
    return f"rank {rank}: {reason_and_file(cause)}"
