"""The memory that control groups leave to a process."""

from pathlib import Path

from treepo.planning.cgroup import cgroup_room


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    for path, limit, used, inactive in (("job", "1000", "400", "100"), ("job/step", "max", "300", "0")):
        group = tmp_path / "fs" / path
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")
    assert cgroup_room(tmp_path / "fs", membership) == [700]


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpuset:/\n3:memory,hugetlb:/docker/abc\n0::/\n")
    group = tmp_path / "fs" / "memory"  # a container sees its own group as the root
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000\n")
    (group / "memory.usage_in_bytes").write_text("1000\n")
    (group / "memory.stat").write_text("total_inactive_file 500\n")
    assert cgroup_room(tmp_path / "fs", membership) == [4500]


def test_no_control_groups(tmp_path: Path) -> None:
    assert cgroup_room(tmp_path, tmp_path / "none") == []
