"""What one rank of the trainer keeps of a micro-batch between forward and backward pass, and beside it.

Derived, operation by operation, from what the layers of `megatron_bridge` save for the backward pass. What is
said of the CPU (plain torch norms, gathered keys) is compared with real ranks in tests/planning/test_memory.py.
What is said of CUDA (fused norms, FlexAttention) is derived in the same way and has not been measured.
Transformer Engine's layers keep the same inputs and outputs of matrices.

Units: bytes. A micro-batch has T tokens, of which a rank holds 1 / tensor outside attention and MLP where
tokens are divided among tensor-parallel ranks.
"""

from dataclasses import dataclass

from megatron_bridge.architecture import Architecture
from megatron_bridge.attention import CPU_BLOCK, CUDA_BLOCK
from megatron_bridge.log_prob import CHUNK_BYTES
from treepo.config.trainer import TrainerConfig

FLOAT32 = 4
GATHER_PADDING = 1.12
"""Keys that the CPU's attention gathers over those it needs: blocks share a call with up to a third more."""
LARGEST_GROUP = 0.45
"""Share of all gathered keys in the largest call of the CPU's attention, on chains."""
COLUMN_BYTES = 76
"""A token's fields in a pack on the device (`treepo.learning.packing.Pack`, with both further log-probs)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """tokens: with padding. context: tokens that one attends to, on average. element: bytes of the dtype.

    eager: plain torch on a CPU, where norms and attention keep more.
    """

    architecture: Architecture
    trainer: TrainerConfig
    tokens: int
    context: float
    element: int
    eager: bool

    @property
    def tensor(self) -> int:
        return self.trainer.parallel.tensor

    @property
    def own_tokens(self) -> float:
        """Those of this rank, outside attention and MLP."""
        return self.tokens / (self.tensor if self.trainer.parallel.sequence_parallel else 1)

    @property
    def stream(self) -> float:
        """One copy of the residual stream."""
        return self.own_tokens * self.architecture.hidden * self.element

    @property
    def whole(self) -> float:
        """One copy of all tokens' hidden states."""
        return self.tokens * self.architecture.hidden * self.element

    def heads(self, count: int) -> float:
        """So many heads' vectors of all tokens, divided among tensor-parallel ranks."""
        return self.tokens * count * self.architecture.dimensions.head_dim * self.element / self.tensor


def norm(batch: MicroBatch, size: float) -> float:
    """Kept by a norm of `size` bytes of input, its output not counted: the input, and without a fused kernel
    the normed input too, both in float32.
    """
    return 2 * size * FLOAT32 / batch.element if batch.eager else size


def attention_core(batch: MicroBatch) -> float:
    """Kept by tree attention itself: query, keys and values, output, the softmax's sums. On a CPU the keys
    and values are those that were gathered for each block of queries, and the output is copied once more.
    """
    heads, groups = batch.architecture.heads, batch.architecture.dimensions.groups
    sums = batch.tokens * heads / batch.tensor * FLOAT32
    if batch.eager:
        return gathered_keys(batch) + 2 * batch.heads(heads) + sums
    return batch.heads(heads) + 2 * batch.heads(groups) + sums


def gathered_keys(batch: MicroBatch) -> float:
    """The CPU's copies of keys and values: a block of queries has the keys above it, and its own."""
    keys = min(batch.context + CPU_BLOCK / 2, batch.tokens) / CPU_BLOCK * GATHER_PADDING
    return keys * 2 * batch.heads(batch.architecture.dimensions.groups)


def attention(batch: MicroBatch) -> float:
    """Kept by a layer's attention with its norm, without `recompute`'s saving inside it."""
    return _around_core(batch) + attention_core(batch)


def _around_core(batch: MicroBatch) -> float:
    heads, groups = batch.architecture.heads, batch.architecture.dimensions.groups
    kept = norm(batch, batch.stream) + batch.stream + batch.heads(heads)  # inputs of both projections
    if batch.architecture.family.qk_norm:
        kept += norm(batch, batch.heads(heads)) + norm(batch, batch.heads(groups))
        if not batch.eager or batch.element == FLOAT32:  # the key is a part of the projection's output
            kept += batch.heads(heads + 2 * groups) - batch.heads(groups)
    return kept


def attention_selective(batch: MicroBatch) -> float:
    """As `attention`, where its core is computed again: of that only the inputs."""
    heads, groups = batch.architecture.heads, batch.architecture.dimensions.groups
    projected = batch.heads(heads + 2 * groups)  # of which the value is a part
    if not batch.architecture.family.qk_norm:
        return _around_core(batch) + batch.heads(heads) + projected
    kept = _around_core(batch) + batch.heads(heads) + batch.heads(groups)
    return kept + (projected if batch.eager and batch.element != FLOAT32 else 0.0)


def mlp(batch: MicroBatch, sparse: bool) -> float:
    """Kept by a layer's MLP or experts with its norm. Experts are taken to be chosen equally often."""
    kept = norm(batch, batch.stream) + batch.stream
    if not sparse:
        return kept + 5 * inner(batch, sparse=False)
    experts = batch.architecture.experts
    assert experts is not None
    router = 4 * batch.own_tokens * batch.architecture.dimensions.experts * FLOAT32
    return kept + router + batch.stream * experts.per_token + 6 * inner(batch, sparse=True)


def inner(batch: MicroBatch, sparse: bool) -> float:
    """A rank's rows between the MLP's matrices: gate, up, their activation and product are as large each."""
    experts = batch.architecture.experts
    if sparse:
        assert experts is not None
        return batch.own_tokens * experts.per_token * experts.intermediate * batch.element
    return batch.tokens * batch.architecture.intermediate * batch.element / batch.tensor


def layer_kept(batch: MicroBatch, sparse: bool) -> float:
    """Kept by one layer from forward to backward pass."""
    if batch.trainer.recompute == "full":
        return batch.stream
    if batch.trainer.recompute == "selective":
        return attention_selective(batch) + mlp(batch, sparse)
    return attention(batch) + mlp(batch, sparse)


def layer_work(batch: MicroBatch, sparse: bool) -> float:
    """The most that the backward pass of one layer needs beyond `layer_kept`: what it computes again, and
    gradients of activations, in the MLP or in attention.
    """
    in_mlp, in_attention = _work_in_mlp(batch, sparse), _work_in_attention(batch) - mlp(batch, sparse)
    if batch.trainer.recompute == "full":  # all of it, and the layer's output
        return attention(batch) + mlp(batch, sparse) + max(in_mlp, in_attention)
    if batch.trainer.recompute == "selective":
        return max(in_mlp, in_attention + attention_core(batch))
    return max(in_mlp, in_attention)


def _work_in_mlp(batch: MicroBatch, sparse: bool) -> float:
    """The gradients of the residual stream and, as the last matrix's input has gone by then, of two of three
    inner rows, or of one of them and all tokens' hidden states. Experts one by one need less: the gradients
    of what they return, in two orders, and as they were sent.
    """
    rows = inner(batch, sparse)
    if not sparse:
        return batch.stream + rows + max(rows, batch.whole if batch.tensor > 1 else 0.0)
    assert batch.architecture.experts is not None
    sent = batch.stream * batch.architecture.experts.per_token
    if batch.eager:
        return 2 * batch.stream + (3 if batch.trainer.parallel.expert > 1 else 2) * sent
    return batch.stream + sent + 2 * rows


def _work_in_attention(batch: MicroBatch) -> float:
    """Beyond what its core keeps. On a CPU: of the largest call, which comes last, the gradients of keys and
    values and those of what was gathered, when the other calls' have gone.
    """
    if batch.eager:
        return (2 * LARGEST_GROUP - (1 - LARGEST_GROUP)) * gathered_keys(batch)
    return 3 * batch.heads(batch.architecture.heads)


def after_layers(batch: MicroBatch) -> float:
    """Kept by the last norm, and what the logits are computed from."""
    gathered = batch.whole if batch.trainer.parallel.sequence_parallel else 0.0
    return norm(batch, batch.stream) + batch.stream + gathered + batch.whole


def logits(batch: MicroBatch, entropy_gradient: bool) -> float:
    """The most that logits and their loss need at once: the product, its float32 copy and the softmax of one
    chunk of tokens, or in the backward pass the gradient of the output matrix beside that of the product.
    """
    rows = -(-batch.architecture.dimensions.vocabulary // batch.tensor)
    chunk = max(1, CHUNK_BYTES // (FLOAT32 * rows))
    chunks = -(-batch.tokens // chunk)
    values = min(batch.tokens, chunk) * rows
    copies = 0 if batch.element == FLOAT32 else batch.element
    forward = values * (4 * FLOAT32 if entropy_gradient else 2 * FLOAT32 + copies)
    matrix = rows * batch.architecture.hidden * batch.element
    backward = values * batch.element + matrix + batch.whole
    return max(forward, backward) + (matrix if chunks > 1 else 0.0)


def pack(batch: MicroBatch) -> float:
    """A micro-batch's fields, angles and attention plan on the device."""
    angles = batch.tokens * batch.architecture.dimensions.head_dim * batch.element
    if batch.eager:
        keys = min(batch.context + CPU_BLOCK / 2, batch.tokens) * GATHER_PADDING * batch.tokens / CPU_BLOCK
        plan = keys * (CPU_BLOCK * batch.element + 8)
    else:
        plan = 16 * (batch.tokens / CUDA_BLOCK) ** 2  # four index tables of int32
    return batch.tokens * COLUMN_BYTES + angles + plan
