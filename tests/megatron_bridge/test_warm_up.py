"""Packs of the warm-up are full and trained, and lead to no division by a length of 0."""

import pytest

from megatron_bridge.warm_up import warm_up_packs


@pytest.mark.parametrize("tokens", [1, 2, 700])
def test_a_full_and_a_shorter_length(tokens: int) -> None:
    first, second = warm_up_packs(tokens, 3)
    assert [len(pack) for pack in first] == [tokens] * 3
    assert [len(pack) for pack in second] == [max(1, tokens // 2)] * 3
    for pack in (*first, *second):
        assert ((pack.source >= 0) == (pack.count_pos > 0)).all()
        assert not pack.advantage_pos.any()
        assert not pack.advantage_neg.any()
