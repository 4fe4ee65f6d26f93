"""The slices of a pack: every token once, equal tokens, and about equal work in attention."""

import numpy as np
import pytest

from treepo.learning.slicing import block_size, imbalance, pack_slices, sliced_length

PROMPT, SEGMENT, WIDTH, LONGEST = 256, 512, 16, 7168
RANKS = (2, 4, 8)


def paper_tree(rng: np.random.Generator) -> np.ndarray:
    """Positions of a tree of the paper's setting, depth first: segments of 512, 16 leaves, answers of up to
    7168 tokens that end anywhere; it branches in two at every segment until it has its leaves.
    """
    runs = [np.arange(PROMPT)]

    def grow(above: int, leaves: int, end: int) -> None:
        length = min(SEGMENT, end - above) if leaves == 1 else SEGMENT
        runs.append(np.arange(above, above + length))
        if leaves > 1:
            for _ in range(2):
                grow(above + length, leaves // 2, int(rng.integers(4 * SEGMENT, LONGEST)))
        elif above + length < end:
            grow(above + length, 1, end)

    for _ in range(2):
        grow(PROMPT, WIDTH // 2, LONGEST)
    return np.concatenate(runs)


def paper_pack(seed: int) -> np.ndarray:
    """One to three such trees."""
    rng = np.random.default_rng(seed)
    return np.concatenate([paper_tree(rng) for _ in range(int(rng.integers(1, 4)))])


PACKS = {f"trees {seed}": paper_pack(seed) for seed in range(6)} | {
    f"a chain of {tokens}": np.arange(tokens) for tokens in (4096, 7424, 32768)
}


def sliced(position_T: np.ndarray, ranks: int, least: int, most: int, multiple: int = 1) -> np.ndarray:
    block = block_size(len(position_T), ranks, least, most)
    length = sliced_length(len(position_T), ranks, block, multiple)
    return pack_slices(np.pad(position_T, (0, length - len(position_T))), ranks, block)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("blocks", [(1, 64), (128, 128)])
@pytest.mark.parametrize("tokens", [1, 7, 63, 500, 4097])
def test_every_token_is_in_one_slice(tokens: int, blocks: tuple[int, int], ranks: int) -> None:
    """Also with more ranks than tokens; slices are ascending, equally long, and divide among two further."""
    slices = sliced(np.arange(tokens), ranks, *blocks, multiple=2)
    assert sorted(slices.reshape(-1).tolist()) == list(range(slices.size))
    assert (np.diff(slices, axis=1) > 0).all()
    assert slices.shape[1] % 2 == 0
    block = block_size(tokens, ranks, *blocks)
    assert tokens <= slices.size < tokens + ranks * max(2, block)
    starts = slices.reshape(ranks, -1, block)
    assert (starts == starts[:, :, :1] + np.arange(block)).all()
    assert (starts[:, :, 0] % block == 0).all()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", PACKS)
def test_work_is_within_a_tenth_of_equal(name: str, ranks: int) -> None:
    """In blocks of FlexAttention, padding included; and no more apart than the largest block."""
    position = PACKS[name]
    slices = sliced(position, ranks, 128, 128)
    whole = np.pad(position, (0, slices.size - len(position)))
    assert imbalance(whole, slices) < 1.1
    pairs = (whole[slices] + 1).sum(axis=1)
    largest = (whole.reshape(-1, 128) + 1).sum(axis=1).max()
    assert pairs.max() - pairs.min() <= largest
    assert pairs.sum() == (whole + 1).sum()


@pytest.mark.parametrize("ranks", RANKS)
def test_consecutive_slices_of_a_chain_would_be_far_from_equal(ranks: int) -> None:
    """So the tests above can fail."""
    chain = np.arange(32768)
    assert imbalance(chain, chain.reshape(ranks, -1)) > 1.4
