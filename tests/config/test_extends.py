"""`extends`: a file overrides the file that it names, and a mistake is reported in the file that has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from treepo.config.evaluate import EvalConfig
from treepo.config.load import _merge, dump_config, load_as, load_config
from treepo.config.run import RunConfig
from treepo.errors import ConfigError

BASE = "out: runs/x\nsteps: 3\nmodel: {path: m}\ndata:\n  train: t.jsonl\n  max_prompt_tokens: 100\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{list(files)[-1]}.yaml"

    return write


def test_sections_are_merged_through_a_chain_and_overrides_come_last(write: Write) -> None:
    path = write(
        base=BASE + "sampling: {width: 2, segment_tokens: 8}\n",
        middle="extends: base.yaml\nsteps: 5\nsampling: {width: 4}\n",
        top="sampling:\n  max_depth: 3\nextends: middle.yaml\n",
    )
    config = load_config(path, ["data.max_prompt_tokens=50"])
    assert (config.steps, config.sampling.width, config.sampling.max_depth) == (5, 4, 3)
    assert (config.sampling.segment_tokens, config.data.max_prompt_tokens) == (8, 50)
    assert "extends" not in dump_config(config)
    assert yaml.safe_load(dump_config(config))["sampling"]["segment_tokens"] == 8


def test_of_several_files_the_later_goes_over_the_earlier(write: Write) -> None:
    path = write(
        base=BASE + "sampling: {width: 2, segment_tokens: 8}\n",
        preset="sampling: {width: 4, max_depth: 5}\nlearning: {estimator: grpo}\n",
        top="extends: [base.yaml, preset.yaml]\nsampling: {max_depth: 3}\n",
    )
    config = load_config(path)
    assert (config.sampling.width, config.sampling.segment_tokens, config.sampling.max_depth) == (4, 8, 3)
    assert config.learning.estimator == "grpo"


def test_two_files_may_extend_the_same_one(write: Write) -> None:
    path = write(
        base=BASE,
        one="extends: base.yaml\nsteps: 4\n",
        two="extends: base.yaml\nsampling: {width: 4}\n",
        top="extends: [one.yaml, two.yaml]\n",
    )
    assert (load_config(path).steps, load_config(path).sampling.width) == (3, 4)


def test_files_that_extend_many_are_refused_before_all_are_read(write: Write) -> None:
    files = {f"f{depth}": f"extends: [f{depth - 1}.yaml, f{depth - 1}.yaml]\n" for depth in range(1, 30)}
    with pytest.raises(ConfigError, match="extends: more than 32 files are extended in all"):
        load_config(write(f0=BASE, **files))


def test_the_path_is_relative_to_the_file_that_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "base.yaml").write_text(BASE)
    (tmp_path / "a" / "b" / "middle.yaml").write_text("extends: ../base.yaml\n")
    (tmp_path / "top.yaml").write_text("extends: a/b/middle.yaml\n")
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert load_config(Path("../../top.yaml")).steps == 3


def test_lists_and_empty_mappings_replace(write: Write) -> None:
    path = write(
        base=BASE + "reward: {terms: {overlong: 1.0}, overlong_buffer_tokens: 9}\n",
        top="extends: base.yaml\nreward: {terms: {}, overlong_buffer_tokens: null}\n",
    )
    assert load_config(path).reward.terms == {}
    evaluation = write(
        base="out: o\nmodel: {path: m}\ndata:\n  benchmarks:\n    - path: a.jsonl\n    - path: b.jsonl\n",
        top="extends: base.yaml\ndata:\n  benchmarks: [{path: c.jsonl}]\n",
    )
    assert [str(item.path) for item in load_as(EvalConfig, evaluation).data.benchmarks] == ["c.jsonl"]


@pytest.mark.parametrize(
    ("base", "top", "message"),
    [
        (BASE + "smpling: {}\n", "", "base.yaml:7: smpling: unknown key; did you mean 'sampling'?"),
        (BASE, "smpling: {}\n", "top.yaml:2: smpling: unknown key; did you mean 'sampling'?"),
        (
            BASE + "sampling:\n  max_depth: four\n",
            "steps: 4\n",
            "base.yaml:8: sampling.max_depth: should be a valid",
        ),
        (
            BASE + "sampling: {max_depth: four}\n",
            "sampling: {max_depth: 4.5}\n",
            "top.yaml:2: sampling.max_depth: should",
        ),
        # The upper file replaces the section as a whole, so no line of the lower file is named.
        (BASE + "sampling:\n  width: 4\n", "sampling: 3\n", "top.yaml:2: sampling: should be a section"),
        (
            BASE + "trainer: {parallel: {tensor: 2}}\n",
            "trainer:\n  parallel: {expert: 3}\n",
            "top.yaml:3: trainer.par",
        ),
        (BASE, "extend: base.yaml\n", "top.yaml:2: extend: unknown key; did you mean 'extends'?"),
    ],
)
def test_a_mistake_is_named_in_the_file_where_it_stands(
    write: Write, base: str, top: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(base=base, top=f"extends: base.yaml\n{top}"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "steps: 1\nextends: none.yaml\n"}, "top.yaml:2: extends: {0}/none.yaml: No such file"),
        (
            {"base": BASE, "top": "extends: [base.yaml, 3]\n"},
            "top.yaml:1: extends: should be the path of a YAML file, or a list, found 3",
        ),
        (
            {"top": "extends: []\n"},
            "top.yaml:1: extends: should be the path of a YAML file, or a list, found []",
        ),
        (
            {"top": "extends:\n"},
            "top.yaml:1: extends: should be the path of a YAML file, or a list, found None",
        ),
        (
            {"base": BASE, "top": "extends: [base.yaml, top.yaml]\n"},
            "top.yaml:1: extends: {0}/top.yaml extends itself",
        ),
        ({"top": "extends: top.yaml\n"}, "top.yaml:1: extends: {0}/top.yaml extends itself, directly"),
        (
            {"a": "extends: b.yaml\n", "b": "extends: a.yaml\n", "top": "extends: a.yaml\n"},
            "b.yaml:1: extends: {0}/a.yaml extends itself, by way of b.yaml",
        ),
        ({"base": "a: [1,\n", "top": "extends: base.yaml\n"}, "base.yaml:2: not YAML"),
        (
            {"base": "- a\n", "top": "extends: base.yaml\n"},
            "base.yaml: expected a mapping of keys, found list",
        ),
        (
            {"base": BASE, "top": "extends: base.yaml\nextends: base.yaml\n"},
            "top.yaml:2: extends: given twice",
        ),
    ],
)
def test_a_file_that_cannot_be_extended_is_one_line(
    write: Write, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(**files))
    assert message.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


TREES = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=8,
)
SECTIONS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


def _leaves(value: Any, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """All values but non-empty mappings, by path."""
    if not isinstance(value, dict) or (not value and above):
        return {above: value}
    return {
        path: leaf for key, below in value.items() for path, leaf in _leaves(below, (*above, key)).items()
    }


@given(SECTIONS, SECTIONS)
def test_the_upper_file_wins_and_what_it_does_not_mention_stays(lower: dict, upper: dict) -> None:
    merged = yaml.safe_load(yaml.safe_dump(lower))
    list(_merge(merged, upper))
    new, old, result = _leaves(upper), _leaves(lower), _leaves(merged)

    def related(path: tuple[str, ...]) -> bool:
        return any(path[: len(leaf)] == leaf or leaf[: len(path)] == path for leaf in new)

    assert result == {path: leaf for path, leaf in old.items() if not related(path)} | new


def test_the_dumped_configuration_stands_alone(write: Write, tmp_path: Path) -> None:
    config = load_config(write(base=BASE, top="extends: base.yaml\nsteps: 7\n"))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text(dump_config(config))
    assert load_as(RunConfig, tmp_path / "alone" / "config.yaml") == config
