"""Whether sampling waits for training, and how stale a trained tree may be."""

from typing import Literal, Self

from pydantic import Field, model_validator

from treepo.config.base import Section


class LoopConfig(Section):
    mode: Literal["sync", "async"] = "sync"
    """`sync`: the engines wait while the trainer learns. `async`: they sample the trees of later steps
    meanwhile, on devices of their own (`placement: split`)."""
    max_staleness: int = Field(default=1, ge=0)
    """The most weight versions between the start of a tree and its training. Under `mode: sync` this matters
    only with `sampling.oversample`."""

    @model_validator(mode="after")
    def _async_is_stale(self) -> Self:
        if self.mode == "async" and self.max_staleness == 0:
            raise ValueError(
                "max_staleness = 0 with mode = async: no tree could begin before the trainer waits for it; "
                "1 or more is allowed, or mode = sync"
            )
        return self
