"""Configuration: YAML and overrides load as written, and a mistake is one line with its place and cause."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from tests.support.paths import ROOT
from treepo.config.base import Section
from treepo.config.evaluate import EvalConfig
from treepo.config.load import RENAMED_KEYS, dump_config, load_as, load_config
from treepo.config.plan import PlanConfig
from treepo.config.rollout import RolloutConfig
from treepo.config.run import ModelConfig, RunConfig
from treepo.errors import ConfigError

EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if path.name != "kuberay.yaml"  # a manifest of Kubernetes
    and path.parent.name != "presets"  # parts of files: test_presets.py
]
MINIMAL = "out: runs/x\nsteps: 3\nmodel: {path: m}\ndata:\n  train: t.jsonl\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_every_example_loads_and_survives_a_round_trip(path: Path, write) -> None:
    schema: type[Section] = RunConfig
    if path.name == "rollout.yaml":
        schema = RolloutConfig
    elif path.name.startswith("eval"):
        schema = EvalConfig
    config = load_as(schema, path)
    assert load_as(schema, write(dump_config(config))) == config


def test_overrides_win_in_order_and_read_yaml(write) -> None:
    overrides = ["sampling.width=4", "trainer.optimizer.learning_rate=1e-5", "sampling.width=8"]
    config = load_config(write(MINIMAL + "sampling: {width: 2, branching: 3}\n"), overrides)
    assert (config.sampling.width, config.sampling.branching) == (8, 3)
    assert config.trainer.optimizer.learning_rate == 1e-5


def test_off_is_a_word_and_true_is_not(write) -> None:
    text = MINIMAL + "sampling: {stops: {boxed: off}}\nlearning: {dynamic_sampling: true}\n"
    config = load_config(write(text), ["sampling.stops.repetition.check=off", "learning.include_root=false"])
    assert (config.sampling.stops.boxed, config.sampling.stops.repetition.check) == ("off", "off")
    assert (config.learning.dynamic_sampling, config.learning.include_root) == (True, False)


@pytest.mark.parametrize(("text", "value"), [("#### ", "#### "), ("null", None), ("~", None)])
def test_an_override_keeps_text_that_yaml_would_swallow(write, text: str, value: str | None) -> None:
    config = load_config(write(MINIMAL), [f"data.columns.answer_after={text}"])
    assert config.data.columns.answer_after == value


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "smpling: {}\n", [], "run.yaml:6: smpling: unknown key; did you mean 'sampling'?"),
        (MINIMAL, ["sampling.widht=3"], "did you mean 'width'?"),
        (MINIMAL, ["[]seed=3"], "[]seed: unknown key; did you mean 'seed'?"),
        (MINIMAL, ["data.[list]=3"], "data.[list]: unknown key; allowed: "),
        (MINIMAL + '"": 3\n', [], "'': unknown key; allowed: "),
        (MINIMAL + 'reward: {"": 3}\n', [], "reward.'': unknown key; allowed: "),
        (MINIMAL + "actor: {}\n", [], "run.yaml:6: actor: unknown key; it is now called 'trainer'"),
        (
            MINIMAL + "learning:\n  importance_cap: 2.0\n",
            [],
            "run.yaml:7: learning.importance_cap: unknown key; write importance: {high: NUMBER} instead",
        ),
        (MINIMAL, ["learning.estimator=gpro"], "found 'gpro'; did you mean 'grpo'?"),
        (MINIMAL, ["learning.kl_estimator=k4"], "should be one of k1, k2, k3, found 'k4'; did you mean 'k"),
        (
            MINIMAL,
            ["reward.terms.lenght=1"],
            "reward.terms.lenght: should be one of format_boxed, ",
        ),
        (MINIMAL, ["data.columns=gsm9k"], "data.columns: should be one of aime24, amc23, gsm8k, "),
        (
            MINIMAL + "sampling:\n  max_depth: four\n",
            [],
            "run.yaml:7: sampling.max_depth: should be a valid integer",
        ),
        (MINIMAL + "steps: 4\n", [], "run.yaml:6: steps: given twice, first at"),
        (MINIMAL, ["model=3"], "model: should be a section (keys and values), found 3"),
        (MINIMAL, ["model.dtype=fp8"], "should be 'auto', 'float32' or 'bfloat16', found 'fp8'"),
        (MINIMAL, ["steps"], "override 'steps': expected KEY=VALUE"),
        (MINIMAL, ["steps.x=1"], "steps is 3, not a section"),
        (MINIMAL, ["data.prompts_per_step=6", "trainer.parallel.data=4"], "1 x 4 = 4 equal parts"),
        (
            MINIMAL,
            ["data.decoded_tokens_per_step=9", "loop.mode=async", "placement=split"],
            "data.decoded_tokens_per_step = 9 with loop.mode = async and sampling.oversample = 1: trees of",
        ),
        (
            MINIMAL,
            ["data.decoded_tokens_per_step=9", "sampling.oversample=1.5"],
            "with loop.mode = sync and sampling.oversample = 1.5: trees of later steps would begin before",
        ),
        (MINIMAL, ["data.decoded_tokens_per_step=0"], "should be greater than or equal to 1"),
        (
            MINIMAL,
            ["trainer.optimizer.schedule=cosine"],
            "schedule = cosine with decay_steps = null and warmup_steps = 10: it needs decay_steps above",
        ),
        (
            MINIMAL,
            ["trainer.optimizer.decay_steps=9"],
            "decay_steps = 9 with schedule = constant: only linear",
        ),
        (
            MINIMAL,
            ["trainer.optimizer={schedule: linear, decay_steps: 20, min_learning_rate: 1e-3}"],
            "min_learning_rate = 0.001 is above learning_rate = 1e-06",
        ),
        (MINIMAL, ["learning.entropy_decay_steps=9"], "with entropy_coefficient = 0: there is no bonus to"),
        (
            MINIMAL,
            ["save_routes=true", "trainer.routing_replay=trainer"],
            "save_routes = true with trainer.routing_replay = trainer: trees have no routes then; rollout is",
        ),
        (
            MINIMAL,
            ["trainer.lora={dropout: 0.1}"],
            "trainer.lora.dropout: 0.1 is not allowed, only 0: a token's log-prob would differ from pass",
        ),
        (MINIMAL, ["trainer.lora={targets: [q_proj, o_proj, q_proj]}"], "q_proj twice; each projection has"),
        (MINIMAL, ["trainer.lora={targets: [lm_head]}"], "trainer.lora.targets.0: should be 'q_proj', 'k_pr"),
        (
            MINIMAL,
            ["trainer={transformer_impl: te, lora: {}}"],
            "transformer_impl = te with lora: adapters are built beside Megatron-Core's own layers; auto",
        ),
        (MINIMAL, ["weights.send=adapter"], "weights.send = adapter with trainer.lora = null: there is no"),
        (
            MINIMAL,
            ["weights.send=adapter", "trainer.lora={targets: [v_proj, o_proj]}"],
            "weights.send = adapter: SGLang computes q_proj, k_proj, v_proj as one; all of them or none are",
        ),
        (
            MINIMAL,
            ["weights.send=adapter", "trainer.lora={targets: [o_proj, up_proj]}"],
            "weights.send = adapter: SGLang computes gate_proj, up_proj as one; all of them or none are",
        ),
        (
            MINIMAL,
            ["weights.send=adapter", "trainer.lora={}", "engine.pipeline=2"],
            "weights.send = adapter with engine.pipeline = 2 and engine.nodes = 1: SGLang's LoRA is tested",
        ),
        (
            MINIMAL,
            ["engine.pipeline=2", "trainer.routing_replay=rollout"],
            "engine.pipeline = 2: SGLang returns the experts of the first stage's layers alone; none and",
        ),
        (
            MINIMAL,
            ["engine.tensor=8", "engine.expert=3"],
            "engine.expert = 3 does not divide engine.tensor = 8; 1, 2, 4, 8 are allowed",
        ),
        (
            MINIMAL,
            ["engine.tensor=2", "engine.pipeline=3", "engine.nodes=2"],
            "engine.tensor x engine.pipeline = 2 x 3 ranks can be divided over 1, 3, 6 nodes: whole",
        ),
        ("steps: 3\n", [], "model: required, but not given"),
        ("- a\n", [], "expected a mapping of keys, found list"),
        ("a: [1,\n", [], "not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place(write, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(text), overrides)
    assert any(message in line for line in str(error.value).splitlines()), error.value


@pytest.mark.parametrize(
    ("dtype", "gpus", "decided"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "bfloat16"),
        ("float32", False, "float32"),
    ],
)
def test_auto_is_decided_by_the_devices(dtype: str, gpus: bool, decided: str) -> None:
    model = ModelConfig.model_validate({"path": "m", "dtype": dtype}).on(gpus=gpus)
    assert (str(model.path), model.dtype) == ("m", decided)


def test_sampling_alone_refuses_the_surplus_of_training() -> None:
    needed = ["out=o", "model.path=m", "data.prompts=x.jsonl"]
    with pytest.raises(ConfigError, match=r"sampling: oversample = 2: .*; 1 is allowed$"):
        load_as(RolloutConfig, None, [*needed, "sampling.oversample=2"])
    assert load_as(RolloutConfig, None, [*needed, "sampling.oversample=1"]).sampling.oversample == 1


def test_float32_is_refused_on_gpus() -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype = float32: .* bfloat16 and auto"):
        ModelConfig.model_validate({"path": "m", "dtype": "float32"}).on(gpus=True)


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        ([], 64 * 16),
        (["engine.count=3"], 22 * 16),  # the fullest engine's share
        (["sampling.max_live_trees=4", "engine.count=2"], 4 * 16),
        (["data.decoded_tokens_per_step=1000000"], None),
        (["data.decoded_tokens_per_step=1000000", "sampling.max_live_trees=100"], 100 * 16),
    ],
)
def test_paths_at_once_are_those_of_an_engines_trees(write, overrides: list[str], paths: int | None) -> None:
    given = ["data.prompts_per_step=64", "sampling.width=16", *overrides]
    assert load_config(write(MINIMAL), given).paths_at_once == paths


def test_sglangs_arguments_are_any_values(write) -> None:
    path = write(MINIMAL + "engine: {sglang: {page_size: 4, kv_cache_dtype: auto, sizes: [1, 2]}}\n")
    config = load_config(path, ["engine.sglang.page_size=8"])
    assert config.engine.sglang == {"page_size": 8, "kv_cache_dtype": "auto", "sizes": [1, 2]}
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_key_that_has_a_new_name_is_told_so(write, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f": {old}: unknown key; it is now called '{new}'$"):
        load_config(write(MINIMAL), [f"{old}={{}}"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def _sections(section: type[BaseModel]):
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _sections(field.annotation)


@pytest.mark.parametrize("schema", [RunConfig, RolloutConfig, EvalConfig])
def test_every_key_is_documented(schema: type[Section]) -> None:
    undocumented = [
        f"{section.__name__}.{name}"
        for section in _sections(schema)
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not undocumented


def _float_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key below `section` that takes a float, itself or in a list or mapping, and how it is given."""
    for name, field in section.model_fields.items():
        for annotation, wrap in _leaves(field.annotation, lambda value: value):
            if annotation is float:
                yield f"{prefix}{name}", wrap
            elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
                for key, inner in _float_keys(annotation):
                    yield f"{prefix}{name}", lambda value, k=key, i=inner, w=wrap: w(_nest(k, i(value)))


def _nest(dotted: str, value: object) -> object:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _leaves(annotation: Any, wrap: Callable[[Any], Any]) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """The types that an annotation is made of, each with what puts a value of it in its place."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(arguments[0], wrap)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _leaves(argument, wrap)
    elif origin in (list, tuple):
        yield from _leaves(arguments[0], lambda value: wrap([value]))
    elif origin is dict:
        yield from _leaves(arguments[1], lambda value: wrap({"overlong": value}))
    elif origin is not Literal:
        yield annotation, wrap


@pytest.mark.parametrize("schema", [RunConfig, RolloutConfig, EvalConfig, PlanConfig])
def test_no_number_may_be_infinite_or_nan(schema: type[Section]) -> None:
    """In every key that takes a float: from a file's value, and as an override."""
    keys = list(_float_keys(schema))
    assert keys
    for key, wrap in keys:
        for number in (math.inf, -math.inf, math.nan):
            value = yaml.safe_dump(wrap(number), default_flow_style=True).removesuffix("...\n").strip()
            with pytest.raises(ConfigError) as error:
                load_as(schema, None, [f"{key}={value}"])
            lines = [line for line in str(error.value).splitlines() if "finite number" in line]
            assert any(f": {key}" in line and f"found {number}" in line for line in lines), error.value


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_a_number_that_is_not_finite_is_named_with_its_place(write, text: str) -> None:
    message = r"trainer.optimizer.learning_rate: should be a finite number, found (inf|-inf|nan)$"
    with pytest.raises(ConfigError, match=rf"run.yaml:6: {message}"):
        load_config(write(MINIMAL + f"trainer: {{optimizer: {{learning_rate: {text}}}}}\n"))
    with pytest.raises(ConfigError, match=message):
        load_config(write(MINIMAL), [f"trainer.optimizer.learning_rate={text}"])
