"""Random streams by name."""

import numpy as np

from treepo.rollout import rng


def test_a_stream_is_that_of_the_key_of_its_names() -> None:
    streams = set()
    for names in [("tree", 0), ("tree", 1), ("tree", "0"), (7, 0, "train:1", "initial", 2)]:
        naive = np.random.Generator(np.random.Philox(key=rng.key(*names)))
        stream = rng.generator(*names)
        np.testing.assert_array_equal(stream.random(9), naive.random(9))
        np.testing.assert_array_equal(stream.integers(0, 1000, 9), naive.integers(0, 1000, 9))
        streams.add(tuple(rng.generator(*names).random(3)))
    assert len(streams) == 4
