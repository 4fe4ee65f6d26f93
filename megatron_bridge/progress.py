"""Counts what this process's trainer rank has finished, so that a rank that hangs differs from one at work.

A plain number that grows: micro-batches, optimizer steps, tensors that were sent, pieces of a checkpoint that
were written or read back. Any thread may read it while another computes.
"""

_finished = 0


def count() -> None:
    """One more piece of work is finished."""
    global _finished
    _finished += 1


def finished() -> int:
    """Pieces of work that were finished since the process began."""
    return _finished
