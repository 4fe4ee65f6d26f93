"""Bytes of activations that one trainer rank keeps for the backward pass, and needs beside them at the peak.

Derived operation by operation from what the layers of `megatron_bridge` save. The CPU's side (plain torch
norms, gathered keys) agrees with real ranks (tests/planning/test_memory.py). CUDA's side (fused norms,
FlexAttention) agrees with one H200 (tests/planning/test_trainer.py), where recomputation, experts and
parallelism were not measured, nor a shared expert anywhere. Transformer Engine's layers keep the same inputs
and outputs of matrices.
"""

from dataclasses import dataclass

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import CPU_BLOCK, CUDA_BLOCK
from megatron_bridge.log_prob import CHUNK_BYTES
from treepo.config.trainer import TrainerConfig
from treepo.planning.memory.parts import FLOAT32

_GATHER_PADDING = 1.12
"""Keys that the CPU's attention gathers over those it needs: blocks share a call with up to a third more."""
_LARGEST_GROUP = 0.45
"""Share of all gathered keys in the largest call of the CPU's attention, on chains."""
_COLUMN_BYTES = 56
"""A token's columns on the device (`megatron_bridge.schedule`), with both further log-probs."""
_SLICE_BYTES = 16
"""A token's place among the wanted ones of a rank, and its source."""
_SLICES_BYTES = 8
"""A token's place among the slices, if there are several; a rank's own ones also have a copy of the token."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A pack as one rank computes it.

    pack_tokens: with padding. tokens: of them, this rank's slice. context: tokens that a token attends to, on
    average. element: bytes of a value.
    eager: plain torch on a CPU, whose norms and attention keep more.
    """

    architecture: Architecture
    trainer: TrainerConfig
    pack_tokens: int
    tokens: int
    context: float
    element: int
    eager: bool

    @property
    def tensor(self) -> int:
        return self.trainer.parallel.tensor

    @property
    def own_tokens(self) -> float:
        """Tokens of this rank outside attention and MLP: sequence parallelism divides them."""
        return self.tokens / self.trainer.parallel.sequence_multiple

    @property
    def stream(self) -> float:
        """One copy of the residual stream."""
        return self.own_tokens * self.architecture.hidden * self.element

    @property
    def whole(self) -> float:
        """One copy of the slice's hidden states."""
        return self.tokens * self.architecture.hidden * self.element

    @property
    def gather_buffer(self) -> float:
        """All tokens' hidden states, gathered for matrices whose output is divided."""
        gathers = self.trainer.parallel.sequence_parallel and self.trainer.lora is None
        return self.whole if gathers else 0.0

    @property
    def queries(self) -> float:
        """Query heads of this rank, all tokens of the slice."""
        return self._heads(self.architecture.heads)

    @property
    def keys(self) -> float:
        """Key heads of this rank, all tokens of the slice; values are as large."""
        return self._heads(self.architecture.dimensions.groups)

    @property
    def slices(self) -> int:
        """Context-parallel ranks, whose keys and values attention gathers."""
        return self.trainer.parallel.context

    def reads(self, *projections: str) -> bool:
        """Whether the backward pass reads the input of the matrix that computes these projections: the
        gradient of a weight does, and that of an adapter.
        """
        lora = self.trainer.lora
        return lora is None or any(name in lora.targets for name in projections)

    def _heads(self, count: int) -> float:
        return self.tokens * count * self.architecture.dimensions.head_dim * self.element / self.tensor


def layer_kept(batch: MicroBatch, sparse: bool) -> float:
    """Kept by one layer from forward to backward pass. sparse: whether its MLP has experts."""
    if batch.trainer.recompute == "full":
        return batch.stream
    if batch.trainer.recompute == "selective":
        return _selective_attention(batch) + _mlp(batch, sparse)
    return _attention(batch) + _mlp(batch, sparse)


def layer_work(batch: MicroBatch, sparse: bool) -> float:
    """The most that one layer's backward pass needs beyond `layer_kept`.

    That is what it computes again, and gradients of activations, in the MLP or in attention.
    """
    in_mlp, in_attention = _work_in_mlp(batch, sparse), _work_in_attention(batch) - _mlp(batch, sparse)
    if batch.trainer.recompute == "full":  # the whole layer, and its output
        return _attention(batch) + _mlp(batch, sparse) + max(in_mlp, in_attention)
    if batch.trainer.recompute == "selective":
        return max(in_mlp, in_attention + _attention_core(batch))
    return max(in_mlp, in_attention)


def after_layers(batch: MicroBatch) -> float:
    """Kept by the last norm, and the input of the logits."""
    gathered = batch.whole if batch.trainer.parallel.sequence_parallel else 0.0
    return _norm(batch, batch.stream) + batch.stream + gathered + batch.whole


def logits(batch: MicroBatch) -> float:
    """The most that logits and their loss need at once, in the backward pass.

    CUDA's kernels turn one chunk's float32 logits into their gradient; plain torch has two further copies and
    the gradient in float32, and on a CPU without a product in float32 the output matrix in float32 too.
    Beside them there is the gradient of the hidden states. Autograd gets an empty gradient of the matrix,
    whose sum is among the gradients.
    """
    rows = -(-batch.architecture.dimensions.vocabulary // batch.tensor)
    values = min(batch.tokens, max(1, CHUNK_BYTES // (FLOAT32 * rows))) * rows
    matrix = rows * batch.architecture.hidden
    chunk = values * (4 * FLOAT32 if batch.eager else FLOAT32 + batch.element)
    if batch.eager and batch.element != FLOAT32:
        chunk += matrix * FLOAT32
    return batch.whole + max(chunk, matrix * batch.element)


def pack(batch: MicroBatch) -> float:
    """A micro-batch's fields, rotary angles and attention plan on the device."""
    angles = batch.tokens * batch.architecture.dimensions.head_dim * FLOAT32
    if batch.eager:
        plan = _gathered_blocks(batch) * batch.tokens * (CPU_BLOCK * batch.element + 8)
    else:  # four index tables of int32
        plan = 16 * (batch.tokens / CUDA_BLOCK) * (batch.pack_tokens / CUDA_BLOCK)
    columns = batch.pack_tokens * _COLUMN_BYTES + batch.tokens * _SLICE_BYTES
    if batch.slices > 1:
        columns += (batch.pack_tokens + batch.tokens) * _SLICES_BYTES + batch.tokens * 4
    return columns + angles + plan


def _norm(batch: MicroBatch, size: float) -> float:
    """Kept by a norm of `size` bytes of input, without its output.

    A fused kernel keeps the input; plain torch keeps the input and, for the weight's gradient, the normed
    input, both in float32.
    """
    copies = 2 if batch.trainer.lora is None else 1
    return copies * size * FLOAT32 / batch.element if batch.eager else size


def _attention(batch: MicroBatch) -> float:
    """Kept by a layer's attention with its norm, nothing of it recomputed."""
    return _around_core(batch) + _attention_core(batch)


def _attention_core(batch: MicroBatch) -> float:
    """Kept by tree attention itself: query, keys and values, output, the softmax's sums.

    On a CPU, keys and values are those gathered for each block of queries, and the output is copied once
    more.
    """
    sums = batch.tokens * batch.architecture.heads / batch.tensor * FLOAT32
    # On CUDA each query head has its own copy of keys and values (megatron_bridge.attention).
    keys_values = _gathered_keys(batch) if batch.eager else 2 * batch.queries * batch.slices
    return keys_values + (2 if batch.eager else 1) * batch.queries + sums


def _gathered_keys(batch: MicroBatch) -> float:
    """The CPU's copies of keys and values: a block of queries has its own and those above it."""
    return _gathered_blocks(batch) * 2 * batch.keys


def _gathered_blocks(batch: MicroBatch) -> float:
    """Keys that the CPU's attention gathers for a block of queries, in blocks."""
    return min(batch.context + CPU_BLOCK / 2, batch.pack_tokens) / CPU_BLOCK * _GATHER_PADDING


def _around_core(batch: MicroBatch) -> float:
    kept = _norm(batch, batch.stream)
    kept += batch.stream if batch.reads("q_proj", "k_proj", "v_proj") else 0.0
    kept += batch.queries if batch.reads("o_proj") else 0.0
    if batch.architecture.family.qk_norm:
        kept += _norm(batch, batch.queries) + _norm(batch, batch.keys)
        if not batch.eager or batch.element == FLOAT32:  # the key is part of the projection's output
            kept += batch.queries + batch.keys
    return kept


def _selective_attention(batch: MicroBatch) -> float:
    """As `_attention`, but only the inputs of the recomputed core are kept."""
    projected = batch.queries + 2 * batch.keys  # the value is part of it
    kept = _around_core(batch) + batch.queries
    if not batch.architecture.family.qk_norm:
        return kept + projected
    return kept + batch.keys + (projected if batch.eager and batch.element != FLOAT32 else 0.0)


def _mlp(batch: MicroBatch, sparse: bool) -> float:
    """Kept by a layer's MLP or experts with its norm. Experts are assumed to be chosen equally often, and
    counted without the fused activation.
    """
    kept = _norm(batch, batch.stream)
    kept += batch.stream if batch.reads("gate_proj", "up_proj") else 0.0
    if not sparse:
        # CUDA's fused activation keeps gate and up, and the last matrix its input.
        copies = (4 if batch.eager else 2) + batch.reads("down_proj")
        return kept + copies * _inner(batch, sparse=False)
    experts = batch.architecture.experts
    assert experts is not None
    router = 4 * batch.own_tokens * batch.architecture.dimensions.experts * FLOAT32
    kept += router + batch.stream * experts.per_token + 6 * _inner(batch, sparse=True)
    if experts.shared:  # as a dense MLP, and its output, which the gate scales
        shared = batch.tokens * experts.shared * batch.element / batch.tensor
        kept += (5 if batch.eager else 3) * shared + batch.stream
    return kept


def _inner(batch: MicroBatch, sparse: bool) -> float:
    """Values between the MLP's matrices: gate, up, their activation and their product are each as large."""
    experts = batch.architecture.experts
    if sparse:
        assert experts is not None
        return batch.own_tokens * experts.per_token * experts.intermediate * batch.element
    return batch.tokens * batch.architecture.intermediate * batch.element / batch.tensor


def _work_in_mlp(batch: MicroBatch, sparse: bool) -> float:
    """Gradients of the residual stream and of two of three inner values, or of one and all hidden states.

    The last matrix's input has gone by then. Experts one by one need less: the gradients of their outputs, in
    two orders, and as they were sent.
    """
    inner = _inner(batch, sparse)
    if not sparse:
        # Beside a frozen weight Megatron-Core gathers hidden states without its buffer.
        gathered = 0.0 if batch.gather_buffer or batch.own_tokens == batch.tokens else batch.whole
        return batch.stream + inner + max(inner, batch.whole if batch.tensor > 1 else 0.0) + gathered
    assert batch.architecture.experts is not None
    sent = batch.stream * batch.architecture.experts.per_token
    if batch.eager:
        return 2 * batch.stream + (3 if batch.trainer.parallel.expert > 1 else 2) * sent
    return batch.stream + sent + 2 * inner


def _work_in_attention(batch: MicroBatch) -> float:
    """Gradients beyond what the core keeps.

    On a CPU the largest call comes last: the gradients of keys and values and of what it gathered are there
    when those of the other calls have gone. Slices of other ranks: their keys and values, which selective and
    full recomputation gather again, and their gradients.
    """
    gathered = 2 * batch.keys * batch.slices if batch.slices > 1 else 0.0
    others = gathered if batch.trainer.recompute == "none" else 2 * gathered
    if batch.eager:
        return (2 * _LARGEST_GROUP - (1 - _LARGEST_GROUP)) * _gathered_keys(batch) + others
    return (1 + 2 * batch.slices) * batch.queries + others
