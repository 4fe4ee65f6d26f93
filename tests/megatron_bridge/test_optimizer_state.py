"""A run of a flattened matrix is at most three rectangles, which hold every value once, in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_bridge.optimizer_state import rectangles


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_rectangles_are_the_run(rows: int, columns: int, data: st.DataObject) -> None:
    matrix = np.arange(rows * columns).reshape(rows, columns)
    start = data.draw(st.integers(0, matrix.size))
    end = data.draw(st.integers(start, matrix.size))
    pieces = list(rectangles(start, end, columns))
    values = [
        matrix[row : row + height, column : column + width].flatten() for row, column, height, width in pieces
    ]
    assert np.concatenate([*values, []]).tolist() == list(range(start, end))
    assert len(pieces) <= 3
