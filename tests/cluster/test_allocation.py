"""The nodes of a launch: the variables of every scheduler, and the combinations that are refused."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.cluster.allocation import Cluster, Flags, find_allocation
from treepo.cluster.schedulers import PORT, Allocation, expand_nodelist
from treepo.errors import AllocationError

SLURM = {
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[08-10]",
    "SLURM_JOB_ID": "71234",
}
TORCHRUN = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "23456"}
ALL_FLAGS = Flags(nodes=2, rank=1, head="10.0.0.1:7000")


def found(environment: Mapping[str, str], flags: Flags | None = None) -> tuple[int, int, str, int]:
    allocation = find_allocation(environment, flags or Flags())
    assert isinstance(allocation, Allocation)
    return allocation.nodes, allocation.rank, allocation.head, allocation.port


def test_every_source_alone() -> None:
    assert found({})[:2] == (1, 0)
    assert found({}, Flags(nodes=1))[:2] == (1, 0)
    assert found({}, ALL_FLAGS) == (2, 1, "10.0.0.1", 7000)
    assert found({}, Flags(nodes=2, rank=0, head="node-a")) == (2, 0, "node-a", PORT)
    nodes, rank, head, port = found(SLURM)
    assert (nodes, rank, head) == (3, 1, "gpu08")
    assert 20_000 <= port < 32_000
    assert found(TORCHRUN) == (4, 2, "10.0.0.7", 23456)
    assert found({f"PET_{name}": value for name, value in TORCHRUN.items()}) == (4, 2, "10.0.0.7", 23456)
    assert find_allocation({"RAY_ADDRESS": "10.0.0.9:6379"}, Flags()) == Cluster("10.0.0.9:6379", 1)
    assert find_allocation({"RAY_ADDRESS": "auto"}, Flags(nodes=5)) == Cluster("auto", 5)


def test_jobs_of_slurm_that_share_a_host_meet_at_different_ports() -> None:
    ports = [found(SLURM | {"SLURM_JOB_ID": str(job)})[3] for job in range(100, 140)]
    assert len(set(ports)) == len(ports)
    assert found(SLURM, Flags(port=5555))[3] == 5555


def test_a_step_of_slurm_may_have_fewer_nodes_than_its_job() -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[09-10]", "SLURM_STEP_NUM_TASKS": "2"}
    assert found(SLURM | step)[:3] == (2, 1, "gpu09")


def test_flags_override_everything_else() -> None:
    loud = SLURM | TORCHRUN | {"RAY_ADDRESS": "auto", "LOCAL_WORLD_SIZE": "8"}
    assert found(loud, ALL_FLAGS) == (2, 1, "10.0.0.1", 7000)


def test_slurm_comes_before_torchrun_if_they_agree() -> None:
    agreeing = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "elsewhere"}
    assert found(SLURM | agreeing)[2] == "gpu08"
    # Scripts for Slurm export these for programs that have one process a GPU.
    assert found(SLURM | {"MASTER_ADDR": "x", "WORLD_SIZE": "24", "RANK": "8"}) == found(SLURM)


def test_torchruns_variables_count_nodes_or_are_refused() -> None:
    assert found({"NNODES": "1"})[:2] == (1, 0)
    assert found({"NNODES": "2:2", "NODE_RANK": "0", "MASTER_ADDR": "a"})[:2] == (2, 0)
    assert found({"WORLD_SIZE": "1", "RANK": "0"})[:2] == (1, 0)
    one_a_node = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "a"}
    assert found(one_a_node) == (4, 3, "a", PORT)
    assert found({"MASTER_ADDR": "a", "MASTER_PORT": "1"})[:2] == (1, 0)


def test_under_torchrun_its_own_store_has_the_port() -> None:
    """The environment is that of `torchrun --nnodes 4 --nproc-per-node 1`."""
    environment = {
        "WORLD_SIZE": "4", "RANK": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": "2",
        "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    assert found(environment) == (4, 2, "10.0.0.7", PORT)


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, Flags(nodes=2), "--nodes 2, but neither Slurm, .* --node-rank R --head"),
        ({}, Flags(nodes=2, rank=1), "--nodes 2 --node-rank 1 without --head"),
        ({}, Flags(head="a"), "--head a without --nodes and --node-rank"),
        ({}, Flags(nodes=2, rank=2, head="a"), "2 nodes have no rank 2"),
        ({}, Flags(nodes=2, rank=0, head="a:b"), "--head a:b: expected HOST or HOST:PORT"),
        ({}, Flags(nodes=2, rank=0, head="a:70000"), "expected HOST or HOST:PORT"),
        ({}, Flags(nodes=2, rank=0, head="a:1", port=2), "--head a:1 contradicts --port 2"),
        (SLURM, Flags(nodes=2), "--nodes 2 contradicts SLURM_NNODES=3, SLURM_NODEID=1"),
        ({"SLURM_NNODES": "2"}, Flags(), "SLURM_NNODES=2, but no SLURM_NODEID and SLURM_JOB_NODELIST"),
        (SLURM | {"SLURM_NNODES": "2"}, Flags(), r"SLURM_NNODES=2 contradicts .*gpu\[08-10\].* 3 hosts"),
        (SLURM | {"SLURM_NODEID": "3"}, Flags(), "3 nodes have no rank 3"),
        (SLURM | {"SLURM_NODEID": "x"}, Flags(), "SLURM_NODEID=x: expected a number"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "24"}, Flags(), "one task on each node"),
        (SLURM | {"NNODES": "2"}, Flags(), "SLURM_NNODES=3, .* contradicts NNODES=2"),
        (SLURM | {"PET_NODE_RANK": "0"}, Flags(), "SLURM_NODEID=1, .* contradicts PET_NODE_RANK=0"),
        (SLURM | {"LOCAL_WORLD_SIZE": "8"}, Flags(), "LOCAL_WORLD_SIZE=8: run one process on each node"),
        (SLURM | {"RAY_ADDRESS": "a:1"}, Flags(), "RAY_ADDRESS=a:1 .* SLURM_NNODES=3.* unset the one"),
        (TORCHRUN | {"RAY_ADDRESS": "a:1"}, Flags(), "RAY_ADDRESS=a:1 .* NNODES=4"),
        (TORCHRUN | {"PET_NNODES": "2"}, Flags(), "NNODES=4 and PET_NNODES=2 contradict"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, Flags(), "not one on each GPU"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, Flags(), "MASTER_PORT=99999: expected a port"),
        (TORCHRUN | {"MASTER_PORT": "0"}, Flags(), "MASTER_PORT=0: expected a port"),
        ({"NNODES": "4", "MASTER_ADDR": "a"}, Flags(), "NNODES=4, MASTER_ADDR=a, but no NODE_RANK"),
        ({"NODE_RANK": "1"}, Flags(), "NODE_RANK=1, but no NNODES and MASTER_ADDR"),
        ({"NNODES": "1:4", "NODE_RANK": "1"}, Flags(), "NNODES=1:4: a launch has a fixed number"),
        ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "a"}, Flags(), "WORLD_SIZE=4 counts processes"),
        (TORCHRUN | {"NNODES": "9" * 5000}, Flags(), "NNODES=999.*: expected a number"),
        (TORCHRUN | {"MASTER_PORT": "\x1b]0;x\x07\n1"}, Flags(), "MASTER_PORT=\ufffd]0;x"),
    ],
)
def test_incomplete_or_contradictory_settings_are_one_line(
    environment: dict[str, str], flags: Flags, message: str
) -> None:
    with pytest.raises(AllocationError, match=message) as caught:
        find_allocation(environment, flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("gpu[08-10,12],login-1", ["gpu08", "gpu09", "gpu10", "gpu12", "login-1"]),
        ("r[1-2]n[9-10]", ["r1n9", "r1n10", "r2n9", "r2n10"]),
        ("n[1]-ib.cluster,m", ["n1-ib.cluster", "m"]),
    ],
)
def test_nodelists(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    "text", ["", "a[", "a[]", "a]", "a,", "a[1-2", "a[1-x]", "a[1-2-3]", "a b", "a[[1]]"]
)
def test_texts_that_are_not_nodelists_are_refused(text: str) -> None:
    with pytest.raises(AllocationError, match="not a Slurm node list"):
        expand_nodelist(text)


@pytest.mark.parametrize(
    "text", ["a[0-99999999999]", "a[1-99999]", "a" + "[0-9]" * 20, "a[" + "9" * 5000 + "]", "b,a[0-65535]"]
)
def test_a_nodelist_has_a_bounded_number_of_hosts(text: str) -> None:
    with pytest.raises(AllocationError, match="more than 65536 hosts"):
        expand_nodelist(text)


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z0-9.-]{0,4}[a-z]", fullmatch=True),
            st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=3),
            st.integers(1, 4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_nodelist_expands_to_the_names_it_was_made_of(
    groups: list[tuple[str, list[tuple[int, int]], int]],
) -> None:
    """Each group: a prefix, ranges as (first, how many more), the width of their numbers."""
    items: list[str] = []
    names: list[str] = []
    for prefix, ranges, width in groups:
        texts = [f"{first:0{width}}-{first + more:0{width}}" for first, more in ranges]
        items.append(f"{prefix}[{','.join(texts)}]" if ranges else prefix)
        names += [
            f"{prefix}{number:0{width}}"
            for first, more in ranges
            for number in range(first, first + more + 1)
        ] or [prefix]
    assert expand_nodelist(",".join(items)) == names
