"""Layouts on clusters of many shapes: where ranks and engines are placed, and which layouts are refused."""

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.cluster.placement import Bundle, Layout, Node, divided, on_one_machine, plan, shares_devices
from treepo.config.engine import node_counts
from treepo.errors import PlacementError


def cluster(*gpus: int, cpus: int = 1000) -> list[Node]:
    return [Node(f"id{i}", f"10.0.0.{i}", cpus, count) for i, count in enumerate(gpus)]


def sizes(layout: Layout, shared: bool) -> list[int]:
    """GPUs of each bundle of a divided layout, by a naive reading of the rules."""
    assert layout.nodes is not None
    share = layout.tensor * layout.pipeline // layout.nodes
    if not shared:
        groups, rest = divmod(layout.ranks, layout.group)
        return [layout.group] * groups + [rest] * bool(rest) + [share] * (layout.engines * layout.nodes)
    found: list[int] = []
    start = 0
    for end in range(1, layout.ranks + 1):
        crosses = end % layout.group or end % share
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
    """Every rank and share is placed once, no node is overfull, and no group or share spans nodes."""
    layout = divided(layout, nodes)
    assert layout.nodes is not None
    share, shares = layout.tensor * layout.pipeline // layout.nodes, layout.engines * layout.nodes
    bundles = [bundle for bundle, _ in placed]
    assert sorted(itertools.chain(*(bundle.ranks for bundle in bundles))) == list(range(layout.ranks))
    assert sorted(itertools.chain(*(bundle.shares for bundle in bundles))) == list(range(shares))
    gpus, cpus = Counter[str](), Counter[str]()
    for bundle, node in placed:
        gpus[node.id] += bundle.gpus
        cpus[node.id] += bundle.cpus
    assert all(gpus[node.id] <= node.gpus and cpus[node.id] <= node.cpus for node in nodes)
    at = {rank: node.id for bundle, node in placed for rank in bundle.ranks}
    for start in range(0, layout.ranks, layout.group):
        assert len({at[rank] for rank in range(start, min(start + layout.group, layout.ranks))}) == 1
    for bundle, node in placed:
        for index in bundle.shares:
            devices = range(index * share, (index + 1) * share)
            if shares_devices(layout, nodes):
                assert set(devices) <= set(bundle.ranks)
                assert bundle.gpus == len(bundle.ranks)
            else:
                assert not bundle.ranks
                assert bundle.gpus == (share if gpus.total() else 0)
            assert node.gpus >= share or not gpus.total()


@given(
    placement=st.sampled_from(["colocated", "split"]),
    group=st.sampled_from([1, 2, 4]),
    groups=st.integers(0, 3),
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4]),
    engines=st.integers(1, 3),
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_plan_is_sound_and_refuses_only_layouts_that_cannot_fit(
    placement: str,
    group: int,
    groups: int,
    tensor: int,
    pipeline: int,
    engines: int,
    gpus: list[int],
    data: st.DataObject,
) -> None:
    nodes = cluster(*gpus)
    count = data.draw(st.sampled_from([None, *node_counts(tensor, pipeline)]))
    layout = Layout(placement, groups * group, group, engines, tensor, pipeline, count)  # type: ignore[arg-type]  # sampled from its values
    layout = divided(layout, nodes)
    shared = shares_devices(layout, nodes)
    parts = sizes(layout, shared)
    devices = engines * tensor * pipeline
    if shared and devices > layout.ranks:
        size = f"{tensor}" if pipeline == 1 else f"{pipeline} x {tensor}"
        with pytest.raises(PlacementError, match=f"{engines} x {size} = {devices} devices"):
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


@given(tensor=st.integers(1, 16), pipeline=st.integers(1, 6), most=st.integers(1, 16))
def test_an_engine_is_divided_over_as_few_nodes_as_hold_it(tensor: int, pipeline: int, most: int) -> None:
    """A node has whole stages, or an equal part of one; no allowed number of nodes below would do."""
    layout = divided(Layout("split", 0, 1, 1, tensor, pipeline), cluster(0, most))
    assert layout.nodes is not None
    stages, ranks = pipeline / layout.nodes, tensor * pipeline / layout.nodes
    assert stages.is_integer() or (1 / stages).is_integer()
    assert ranks.is_integer()
    assert ranks <= most
    allowed = [n for n in range(1, tensor * pipeline + 1) if n in node_counts(tensor, pipeline)]
    assert all(tensor * pipeline / count > most for count in allowed if count < layout.nodes)


def test_an_engine_on_cpus_is_on_one_node_unless_told_otherwise() -> None:
    nodes = cluster(0, 0, cpus=1)
    (one,) = plan(Layout("split", 0, 1, 1, 16), nodes)
    assert one[0].shares == range(1)
    two = plan(Layout("split", 0, 1, 1, 16, nodes=2), nodes)
    assert [(bundle.shares, node.id) for bundle, node in two] == [
        (range(1), "id0"),
        (range(1, 2), "id1"),
    ]


def test_a_refusal_of_an_engine_over_nodes_says_how_it_would_be_divided() -> None:
    with pytest.raises(
        PlacementError,
        match=r"split: 2 engines of 2 x 16 on 4 nodes each \(engine.count, engine.pipeline x engine.tensor\) "
        r"need 64 GPUs and 8 CPUs, 8 of the GPUs on one node",
    ):
        plan(Layout("split", 0, 1, 2, 16, 2), cluster(8, 8, 8, 8))


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
        (Layout("colocated", 16, 4, 1, 8, 2), cluster(8, 8), False),  # an engine of two nodes
        (Layout("split", 4, 4, 1, 4), cluster(8), True),
        (Layout("split", 8, 8, 1, 8), cluster(8, 8), False),
    ],
)
def test_whether_all_engines_share_a_machine_with_the_sending_rank(
    layout: Layout, nodes: Sequence[Node], expected: bool
) -> None:
    assert on_one_machine(plan(layout, nodes)) is expected
