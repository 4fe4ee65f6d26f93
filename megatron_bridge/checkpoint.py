"""Training checkpoints: everything that the next optimizer step depends on, to any layout's ranks and back.

The tensors are Megatron-Core's sharded ones, in its `torch_dist` format: pieces of the whole model's, so that
the ranks that load may be arranged otherwise than those that saved. The optimizer's settings are not stored:
they are the configuration's.

Saving copies the state to host memory, and a thread writes it while the ranks do other things. Megatron-Core
would write from a forked process, which its threads and Ray's make unsafe, and would hide why a write fails.
"""

import errno
import io
import traceback
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
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
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
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_bridge.architecture import check_same_model
from megatron_bridge.atomic_folder import commit_folder, discard_folder, partial_folder, start_folder
from megatron_bridge.collective import on_first_rank, reason
from megatron_bridge.folder import add_other_files
from megatron_bridge.optimizer_state import set_steps, sharded_moments
from treepo.errors import CheckpointError, ModelError
from treepo.training.checkpoint_manifest import (
    HUGGING_FACE,
    TRAINER,
    CheckpointManifest,
    read_manifest,
)

# Ranks with nothing to write wait so long for those that write.
_LONGEST_WRITE = timedelta(hours=6)
_EXTRA = "_extra_state"  # of Transformer Engine's layers, for 8-bit training alone
# One tensor a parameter, not one of all layers or all experts.
_KEYS = {"singleton_local_shards": True}


# Megatron-Core asks for it when it loads; what it would hold is in the manifest.
_COMMON = ShardedObject("common_state", {}, (1,), (0,))
COMMON_STATE = _COMMON.unique_key


@dataclass(frozen=True, slots=True)
class _Writing:
    """A checkpoint on its way to the disk."""

    folder: Path
    done: Future[str | None]


class Checkpointer:
    """One rank's part in saving and loading `chunks` and their optimizer. Every method is collective.

    model: the Hugging Face folder whose config, tokenizer and generation config go along. layout: the ranks'
    arrangement, as the manifest keeps it.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        model: Path,
        layout: Mapping[str, int],
    ) -> None:
        self._chunks, self._optimizer, self._model, self._layout = chunks, optimizer, model, layout
        # The thread's own group: what it sends cannot meet what the rank sends meanwhile.
        self._group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None

    def save(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Begin a checkpoint: return once the state is copied. `finish` ends it; one is written at a time.

        Raises CheckpointError where the folder cannot be made, or the checkpoint before could not be written.
        """
        self.finish()
        on_first_rank(lambda: _begin(folder, self._model, manifest), f"checkpoint {folder}")
        model = self._weights()
        state = {"model": model, "optimizer": sharded_moments(self._optimizer, model), "rng": _generators()}
        for sharded in nested_values([state["model"], state["optimizer"]]):
            sharded.data = sharded.data.detach().to("cpu", copy=True)  # because training goes on
        tensors: Any = save_preprocess(state, validate_access_integrity=False)[0]
        tensors["common_state"] = replace(_COMMON, replica_id=dist.get_rank())
        flat, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        done = self._thread.submit(_write, partial_folder(folder), mcore_to_pyt_state_dict(flat), self._group)
        self._writing = _Writing(folder, done)

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete on the disk; at once where none was.

        Raises CheckpointError, the same on every rank, where some rank could not write its part.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        what = f"checkpoint {writing.folder}"
        failure = writing.done.result()
        if failure is not None:
            if dist.get_rank() == 0:
                discard_folder(writing.folder)
            raise CheckpointError(f"{what}: {failure}")
        on_first_rank(lambda: commit_folder(writing.folder), what)

    def load(self, folder: Path) -> CheckpointManifest:
        """Fill model, optimizer and, at the same layout, generators. Weights alone leave an optimizer that
        has taken no step. Raises ModelError where the folder is no checkpoint of this model.
        """
        manifest = read_manifest(folder)
        check_same_model(folder / HUGGING_FACE, self._model)
        model = self._weights()
        state: dict[str, Any] = {"model": model}
        if manifest.has_optimizer:
            state["optimizer"] = sharded_moments(self._optimizer, model)
        if manifest.layout == self._layout:
            state["rng"] = _generators()
        try:
            # The optimizer's values are read into its own memory.
            loaded: Any = dist_checkpointing.load(
                state, str(folder / TRAINER), validate_access_integrity=False
            )
        except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
            raise ModelError(f"{folder}: not readable as this model's: {reason(error)[:300]}") from None
        for index, chunk in enumerate(self._chunks):
            missing, unexpected = chunk.module.load_state_dict(loaded["model"][index], strict=False)
            assert not unexpected, unexpected
            assert all(name.endswith(_EXTRA) for name in missing), missing
        if manifest.has_optimizer:
            set_steps(self._optimizer, manifest.optimizer_steps)
        else:
            self._optimizer.reload_model_params()
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["torch"])
            _tracker().set_states(loaded["rng"]["tensor_parallel"])
        return manifest

    def close(self) -> None:
        """End the thread. What it writes stays incomplete without `finish`."""
        self._thread.shutdown()

    def _weights(self) -> dict[int, dict[str, Any]]:
        """Each chunk's parameters, as sharded tensors that share its memory."""
        return {index: sharded_parameters(chunk.module) for index, chunk in enumerate(self._chunks)}


def _generators() -> ShardedObject:
    """Nothing random is left in the model, but what is added to it shall not lose its place."""
    states = {"torch": torch.get_rng_state(), "tensor_parallel": _tracker().get_states()}
    return ShardedObject("rng", states, (dist.get_world_size(),), (dist.get_rank(),))


def _tracker() -> Any:
    """Megatron-Core's generators by name, typed as optional there."""
    return tensor_parallel.get_cuda_rng_tracker()


def sharded_parameters(module: Any) -> dict[str, Any]:
    """A model chunk's parameters, as sharded tensors that share its memory."""
    state = module.sharded_state_dict(metadata=_KEYS)
    return {name: sharded for name, sharded in state.items() if not name.endswith(_EXTRA)}


def declare_format(folder: Path) -> None:
    """Without its file Megatron-Core does not take the folder for a checkpoint."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def common_state() -> io.BytesIO:
    """What a checkpoint holds as COMMON_STATE."""
    data = io.BytesIO()
    torch.save([_COMMON.data], data)
    return data


def _begin(folder: Path, model: Path, manifest: CheckpointManifest) -> None:
    if folder.exists():
        raise FileExistsError(errno.EEXIST, "it exists, and nothing is overwritten", str(folder))
    partial = start_folder(folder)
    try:
        (partial / TRAINER).mkdir()
        (partial / HUGGING_FACE).mkdir()
        add_other_files(model, partial / HUGGING_FACE, manifest.dtype)
        manifest.write(partial)
        declare_format(partial / TRAINER)
    except OSError:
        discard_folder(folder)
        raise


def _write(folder: Path, state: dict[str, Any], group: Any) -> str | None:
    """Write this rank's part. Returns which rank could not write its part and why: the same on every rank."""
    try:
        save(
            state,
            storage_writer=_Writer(folder / TRAINER),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:  # torch tells every rank of every rank's failure
        rank, (cause, _) = min(error.failures.items(), key=itemgetter(0))
        return f"rank {rank}: {reason(cause)}"
    return None


class _Writer(FileSystemWriter):
    """Torch keeps a failure in a circle with its frames, which hold views of buffers; the garbage collector
    of Python 3.12.1 crashes on those. Here a failure leaves its frames empty.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except OSError as error:
            earlier: BaseException | None = error
            while earlier is not None:
                traceback.clear_frames(earlier.__traceback__)
                earlier = earlier.__context__
            raise
