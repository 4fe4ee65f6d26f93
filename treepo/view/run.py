"""The part "Run" of the page: what a run's metrics, configuration, log and status say."""

from collections.abc import Iterable, Sequence

from treepo.view.part import Part, Query
from treepo.view.sources import Source


def run_part(sources: Sequence[Source]) -> Part:
    """The tab "Run" of these sources."""
    del sources

    def exported() -> Iterable[tuple[str, Query]]:
        return ()

    return Part("run", "Run", ("uPlot.iife.min.js", "uPlot.min.css"), {}, exported)
