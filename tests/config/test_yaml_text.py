"""YAML that is hostile, damaged or surprising: one line with file and line, in bounded time and memory."""

from pathlib import Path

import pytest

from treepo.config.load import dump_config, load_config
from treepo.config.yaml_text import MAX_BYTES, MAX_DEPTH, read_mapping, read_value
from treepo.errors import ConfigError

MINIMAL = "out: runs/x\nsteps: 3\nmodel: {path: m}\ndata:\n  train: t.jsonl\n"
LAUGHS = "a0: &a0 [1, 2]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
MERGED = "a0: &a0 {k: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2024-13-45", ":6: not YAML: 2024-13-45 is read as a date, which no key takes"),
        ("seed: 2024-02-28", ":6: not YAML: 2024-02-28 is read as a date, which no key takes"),
        ("seed: 12:30:45", ":6: not YAML: 12:30:45 is read as a number to base 60; write it to base 10"),
        ("seed: -1:30.5", ":6: not YAML: -1:30.5 is read as a number to base 60"),
        ("seed: 010", ":6: not YAML: 010 is read as a number to base 8; write it to base 10"),
        ("seed: 0_17", ":6: not YAML: 0_17 is read as a number to base 8"),
        ("1:30: 5", ":6: not YAML: 1:30 is read as a number to base 60"),
        ("plan: &p\n  x: *p", ":7: not YAML: *p is a part of itself"),
        ("plan: &p\n  <<: *p", ":7: not YAML: *p is a part of itself"),
        ("plan: [&p [*p]]", ":6: not YAML: *p is a part of itself"),
        ("plan: *nowhere", ":6: not YAML: found undefined alias"),
        (LAUGHS, ": not YAML: more than 20000 values"),
        (MERGED, ": not YAML: more than 20000 values"),
        ("plan: " + "[" * 100_000, f":6: not YAML: more than {MAX_DEPTH} levels"),
        ("plan: " + "{a: " * 100_000, f":6: not YAML: more than {MAX_DEPTH} levels"),
        ("seed: " + "1" * 5000, ":6: not YAML: a number of more than 4300 characters"),
        ("seed: 0x" + "f" * 5000, ":6: not YAML: a number of more than 4300 characters"),
        ("seed: !!int abc", ":6: not YAML: 'abc' cannot be read as int"),
        ("seed: !!float x", ":6: not YAML: 'x' cannot be read as float"),
        ("seed: !!int [1]", ":6: not YAML: expected a scalar node, but found sequence"),
        ("seed: !!float {a: 1}", ":6: not YAML: expected a scalar node, but found mapping"),
        ("seed: !!bool x", ":6: not YAML: 'x' cannot be read as bool"),
        ("seed: !!timestamp x", ":6: not YAML: x is read as a date"),
        ("seed: !!binary é", ":6: not YAML: "),
        ("seed: !!python/object/apply:os.system [ls]", ":6: not YAML: could not determine a constructor"),
        ("? [a]\n: 1", ":6: not YAML: found unhashable key"),
        ("plan:\n\tx: 1", ":7: not YAML: found character '\\t'"),
        ('seed: "\\ud800"', ":6: not YAML: '\\ud800' has a character that no text may have"),
        ('seed: "a\\0b"', ":6: not YAML: 'a\\x00b' has a character that no text may have"),
        ("seed: 'a\0b'", ":6: not YAML: the character 0x0000 is not allowed"),
        ("---\na: 1", ": not YAML: but found another document"),
        ("plan: {a: 1, a: 2}", ":6: plan.a: given twice"),
        ("x" * (1 << 20), ": more than 1048576 bytes, so no configuration"),
        ("? |\n  a\n  b\n: 1", ":6: a b: unknown key"),
    ],
)
def test_a_mistake_is_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + text + "\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    said = str(error.value)
    assert said.startswith(str(path))
    assert message in said
    assert "\n" not in said
    assert len(said) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("value", "found"), [("2024_02_03", "20240203"), ("1e3", "1000.0"), ("[a]", "['a']")]
)
def test_a_path_that_is_read_as_something_else_needs_quotes(tmp_path: Path, value: str, found: str) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml", [f"out={value}"])
    assert str(error.value).endswith(f"out: should be a path, found {found}; to mean text, put it in quotes")
    assert str(load_config(tmp_path / "run.yaml", [f"out='{value}'"]).out) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": expected a mapping of keys, found nothing"),
        (b"# only a comment\n", ": expected a mapping of keys, found nothing"),
        (b"a: 1\nb: \xff\n", ":2: not UTF-8 text"),
        ("a: 1\n".encode("utf-16"), ":1: not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", ":1: not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_yaml_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    assert str(error.value) == f"{tmp_path / 'run.yaml'}{message}"


@pytest.mark.parametrize(
    "override", ["out=2024-02-30", "out=2024-02-28", "seed=&a [*a]", "seed=" + "[" * 99_999]
)
def test_an_override_is_held_to_the_same(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"^override '.*: not YAML: ") as error:
        load_config(tmp_path / "run.yaml", [override])
    assert len(str(error.value)) < 400


def test_a_quoted_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL.replace("runs/x", "'2024-02-30'"))
    assert load_config(tmp_path / "run.yaml").out == Path("2024-02-30")


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    text = "a: &a {x: {y: 1}, z: [1]}\nb: *a\nc: {<<: *a}\n"
    (tmp_path / "run.yaml").write_text(text)
    values, _ = read_mapping(tmp_path / "run.yaml")
    values["b"]["x"]["y"] = 2
    values["b"]["z"].append(2)
    assert values["a"] == values["c"] == {"x": {"y": 1}, "z": [1]}


def test_a_mark_of_byte_order_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config(tmp_path / "run.yaml").steps == 3


@pytest.mark.parametrize("seed", [0, 2**31, 2**32, 2**64, 10**40])
def test_seeds_of_any_size_survive_a_round_trip(tmp_path: Path, seed: int) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL + f"seed: {seed}\n")
    config = load_config(tmp_path / "run.yaml")
    assert config.seed == seed
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_chain_of_files_has_an_end(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match="more than 32 files are extended in all"):
        load_config(tmp_path / "0.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "run.yaml").write_text("extends: loop.yaml\n")
    with pytest.raises(ConfigError, match=r"loop\.yaml: Too many levels of symbolic links"):
        load_config(tmp_path / "run.yaml")


def test_twenty_mistakes_are_enough(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL + "".join(f"key{number}: 1\n" for number in range(500)))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("480 more mistakes")


@pytest.mark.parametrize(
    "text", ["9" * MAX_BYTES, "1" + ":1" * (MAX_BYTES // 2 - 1), "1_" * (MAX_BYTES // 2)]
)
def test_a_number_of_any_length_is_one_line_at_once(text: str) -> None:
    """Each took time in the square of its length."""
    with pytest.raises(ConfigError, match="place: not YAML: a number of more than 4300 characters"):
        read_value(text, "place")
