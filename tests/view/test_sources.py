"""The paths of `treepo view` name runs, evaluations and rollouts."""

from pathlib import Path

import pytest

from tests.support.run_folders import write_run_folder
from treepo.errors import DataError
from treepo.view.sources import find_sources


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("first/run", "second/run", "third"):
        write_run_folder(tmp_path / name)
    return tmp_path


def names(*paths: Path) -> list[str]:
    return [source.name for source in find_sources(paths)]


def test_a_source_has_the_shortest_name_that_no_other_has(runs: Path) -> None:
    assert names(runs / "first/run") == ["run"]
    assert names(runs / "first/run", runs / "second/run") == ["first/run", "second/run"]
    assert names(runs / "first/run", runs / "third") == ["run", "third"]


def test_a_folder_without_a_run_stands_for_those_directly_below_it(runs: Path) -> None:
    write_run_folder(runs / "fourth")
    assert names(runs) == ["fourth", "third"]


def test_earlier_files_inside_a_run_are_not_shown_with_it(runs: Path) -> None:
    write_run_folder(runs / "third/previous-1")
    assert names(runs / "third") == ["third"]
    assert names(runs / "third/previous-1") == ["previous-1"]


def test_each_source_is_shown_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs / "third")
    assert names(Path(), runs / "third", runs / "third/trees.jsonl", runs / "third/metrics.jsonl") == [
        "third"
    ]


def test_a_file_of_trees_needs_no_folder_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text("")
    (source,) = find_sources([file])
    assert (source.name, source.trees) == ("some.jsonl", file)


def test_a_path_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        find_sources([tmp_path])
    with pytest.raises(DataError, match="No such file"):
        find_sources([tmp_path / "absent"])
