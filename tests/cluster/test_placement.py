"""Layouts on clusters of many shapes: where ranks and engines are placed, and which layouts are refused."""

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.cluster.placement import Bundle, Layout, Node, on_one_machine, plan, shares_devices
from treepo.errors import PlacementError


def cluster(*gpus: int, cpus: int = 1000) -> list[Node]:
    return [Node(f"id{i}", f"10.0.0.{i}", cpus, count) for i, count in enumerate(gpus)]


def sizes(layout: Layout, shared: bool) -> list[int]:
    """GPUs of each bundle, by a naive reading of the rules."""
    if not shared:
        groups, rest = divmod(layout.ranks, layout.group)
        return [layout.group] * groups + [rest] * bool(rest) + [layout.tensor] * layout.engines
    found: list[int] = []
    start = 0
    for end in range(1, layout.ranks + 1):
        crosses = end % layout.group or end % layout.tensor
        if not crosses or end == layout.ranks:
            found.append(end - start)
            start = end
    return found


def fits(parts: Sequence[int], nodes: Sequence[int]) -> bool:
    """Whether some assignment of the parts to nodes fits; all are tried."""
    if not parts:
        return True
    return any(
        fits(parts[1:], [*nodes[:i], nodes[i] - parts[0], *nodes[i + 1 :]])
        for i in range(len(nodes))
        if nodes[i] >= parts[0]
    )


def check(layout: Layout, nodes: Sequence[Node], placed: Sequence[tuple[Bundle, Node]]) -> None:
    """Every rank and engine is placed once, no node is overfull, and no group or engine spans nodes."""
    bundles = [bundle for bundle, _ in placed]
    assert sorted(itertools.chain(*(bundle.ranks for bundle in bundles))) == list(range(layout.ranks))
    assert sorted(itertools.chain(*(bundle.engines for bundle in bundles))) == list(range(layout.engines))
    gpus, cpus = Counter[str](), Counter[str]()
    for bundle, node in placed:
        gpus[node.id] += bundle.gpus
        cpus[node.id] += bundle.cpus
    assert all(gpus[node.id] <= node.gpus and cpus[node.id] <= node.cpus for node in nodes)
    at = {rank: node.id for bundle, node in placed for rank in bundle.ranks}
    for start in range(0, layout.ranks, layout.group):
        assert len({at[rank] for rank in range(start, min(start + layout.group, layout.ranks))}) == 1
    for bundle, node in placed:
        for engine in bundle.engines:
            devices = range(engine * layout.tensor, (engine + 1) * layout.tensor)
            if shares_devices(layout, nodes):
                assert set(devices) <= set(bundle.ranks)
                assert bundle.gpus == len(bundle.ranks)
            else:
                assert not bundle.ranks
                assert bundle.gpus == (layout.tensor if gpus.total() else 0)
            assert node.gpus >= layout.tensor or not gpus.total()


@given(
    placement=st.sampled_from(["colocated", "split"]),
    group=st.sampled_from([1, 2, 4]),
    groups=st.integers(0, 3),
    tensor=st.sampled_from([1, 2, 4, 8]),
    engines=st.integers(1, 3),
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_a_plan_is_sound_and_refuses_only_layouts_that_cannot_fit(
    placement: str, group: int, groups: int, tensor: int, engines: int, gpus: list[int]
) -> None:
    layout = Layout(placement, groups * group, group, engines, tensor)  # type: ignore[arg-type]  # sampled from its values
    nodes = cluster(*gpus)
    shared = shares_devices(layout, nodes)
    parts = sizes(layout, shared)
    if shared and engines * tensor > layout.ranks:
        with pytest.raises(PlacementError, match=f"{engines} x {tensor} = {engines * tensor} devices"):
            plan(layout, nodes)
    elif any(gpus) and not fits(sorted(parts, reverse=True), gpus):
        with pytest.raises(PlacementError, match=f"10.0.0.0 has {gpus[0]} GPUs"):
            plan(layout, nodes)
    else:
        placed = plan(layout, nodes)
        check(layout, nodes, placed)
        if any(gpus):
            assert Counter(bundle.gpus for bundle, _ in placed) == Counter(parts)


@given(
    group=st.integers(1, 6),
    tensor=st.integers(1, 6),
    ranks=st.integers(1, 16),
    engines=st.integers(1, 16),
)
def test_sizes_that_do_not_divide_each_other_are_placed_soundly_too(
    group: int, tensor: int, ranks: int, engines: int
) -> None:
    for placement in ("colocated", "split"):
        layout = Layout(placement, ranks, group, engines, tensor)
        nodes = cluster(64, 64)
        try:
            check(layout, nodes, plan(layout, nodes))
        except PlacementError:
            assert engines * tensor > (ranks if placement == "colocated" else 128 - 64)


def test_without_gpus_every_rank_and_engine_takes_a_cpu() -> None:
    layout = Layout("colocated", 2, 2, 3, 2)
    nodes = cluster(0, 0, cpus=3)
    check(layout, nodes, plan(layout, nodes))
    with pytest.raises(PlacementError, match=r"need 5 CPUs, .*: 10.0.0.0 has 0 GPUs and 4 CPUs"):
        plan(layout, cluster(0, cpus=4))


def test_a_refusal_shows_the_arithmetic() -> None:
    with pytest.raises(
        PlacementError,
        match=r"split: 8 trainer ranks in groups of 4 \(trainer.parallel\) and 2 engines of 8 "
        r"\(engine.count, engine.tensor\) need 24 GPUs and 10 CPUs, 8 of the GPUs on one node, and do not "
        r"fit into the cluster: 10.0.0.0 has 16 GPUs and 1000 CPUs; 10.0.0.1 has 7 GPUs",
    ):
        plan(Layout("split", 8, 4, 2, 8), cluster(16, 7))


@pytest.mark.parametrize(
    ("layout", "nodes", "expected"),
    [
        (Layout("colocated", 8, 4, 2, 4), cluster(8), True),
        (Layout("colocated", 16, 4, 4, 4), cluster(8, 8), False),
        (Layout("colocated", 16, 4, 2, 4), cluster(8, 8), True),  # the other node's ranks have no engine
        (Layout("split", 4, 4, 1, 4), cluster(8), True),
        (Layout("split", 8, 8, 1, 8), cluster(8, 8), False),
    ],
)
def test_whether_all_engines_share_a_machine_with_the_sending_rank(
    layout: Layout, nodes: Sequence[Node], expected: bool
) -> None:
    assert on_one_machine(plan(layout, nodes)) is expected
