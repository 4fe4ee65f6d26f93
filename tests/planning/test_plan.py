"""`treepo plan`: a run that fits is planned in full, one that does not ends with layouts that do."""

import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.paths import ROOT
from treepo.cli.main import app
from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.errors import ConfigError
from treepo.planning import plan as planning
from treepo.planning.fit import fit
from treepo.planning.plan import Plan, make_plan, model_folder

QWEN3_8B = "examples/models/qwen3-8b.yaml"
SMALL = (  # a step that is sampled quickly
    "data.prompts_per_step=8",
    "learning.mini_batches=1",
    "reward.overlong_buffer_tokens=64",
    "sampling.max_response_tokens=1024",
    "sampling.segment_tokens=128",
    "sampling.max_depth=8",
    "plan.response_tokens=300",
)
SPLIT = ("placement=split", "weights.transport=broadcast")
AHEAD = (*SPLIT, "loop.mode=async")
TOO_LARGE = ("trainer.parallel.tensor=1", "trainer.parallel.data=8", "trainer.recompute=none")

BUDGET = ("data.decoded_tokens_per_step=1000000",)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples name their architectures relative to the repository."""
    monkeypatch.chdir(ROOT)


def config_of(*overrides: str) -> RunConfig:
    return load_config(Path(QWEN3_8B), [*SMALL, *overrides])


def silent(work: str) -> None:
    del work


@cache
def planned(*overrides: str) -> Plan:
    """Each plan is made once: it takes a second, and no test changes it."""
    return make_plan(config_of(*overrides), silent)


def test_context_is_proposed_if_a_pack_is_too_long() -> None:
    config = load_config(
        Path("examples/models/qwen3-8b-32k.yaml"),
        ["trainer.parallel.context=1", "trainer.parallel.data=4"],
    )
    plan = make_plan(config, silent)
    assert plan.fit.problem is not None
    assert any("trainer.parallel.context=2" in proposal.overrides for proposal in plan.proposals)


@pytest.fixture
def made_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command shows the plans of `planned`."""
    known = {overrides: config_of(*overrides) for overrides in (SPLIT, AHEAD, TOO_LARGE, BUDGET, ())}

    def find(config: RunConfig, report: object) -> Plan:
        del report
        (overrides,) = (overrides for overrides in known if known[overrides] == config)
        return planned(*overrides)

    monkeypatch.setattr(planning, "make_plan", find)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", QWEN3_8B, *SMALL, *arguments])


@pytest.mark.usefixtures("made_plans")
def test_a_budget_of_tokens_is_told_in_trees() -> None:
    plan = planned(*BUDGET)
    assert plan.sampling is not None
    assert plan.sampling.decoded_tokens == planned().sampling.decoded_tokens  # type: ignore[reportOptionalMemberAccess]  # it fits too
    tokens = plan.sampling.decoded_tokens
    expected = (
        f"Planned with data.prompts_per_step = 8 trees, which decode {tokens:,.0f} tokens; "
        f"data.decoded_tokens_per_step = 1,000,000 is {8e6 / tokens:,.0f} of these trees."
    )
    assert expected in run(*BUDGET).output
    assert "of these trees" not in run().output


def test_a_run_that_fits_is_planned_in_full() -> None:
    plan = planned()
    assert plan.fit.problem is None
    assert plan.parameters == 8_190_735_360
    assert plan.step is not None
    assert plan.sampling is not None
    assert list(plan.step.phases) == ["sample", "log_probs", "train", "optimizer", "weight_sync"]
    assert plan.step.seconds == pytest.approx(sum(phase.seconds for phase in plan.step.phases.values()))
    assert plan.sampling.leaf_tokens > plan.sampling.decoded_tokens > 0
    assert not plan.proposals


@pytest.mark.usefixtures("made_plans")
def test_an_asynchronous_run_has_devices_of_its_own_for_each_side() -> None:
    sync, ahead = planned(*SPLIT), planned(*AHEAD)
    assert sync.step is not None
    assert ahead.step is not None
    assert ahead.fit.footprint.devices == sync.fit.footprint.devices == 16
    assert ahead.step.seconds < sync.step.seconds
    assert ahead.step.engines_idle < sync.step.engines_idle
    assert ahead.step.trainer_idle < sync.step.trainer_idle
    beside = run(*AHEAD)
    assert "loop: asynchronous, at most 16 trees started and not trained" in beside.stdout
    assert "Engines and trainer work side by side: " in beside.stdout
    assert "Engines and trainer take turns: " in run(*SPLIT).stdout


def test_every_proposal_fits_and_is_another_idea() -> None:
    plan = planned(*TOO_LARGE)
    assert plan.fit.problem is not None
    assert "trainer, pipeline stage 0: needs" in plan.fit.problem
    assert plan.step is None
    assert len(plan.proposals) == 3
    ideas = []
    for proposal in plan.proposals:
        config = config_of(*TOO_LARGE, *proposal.overrides)
        assert fit(config, model_folder(config)).problem is None
        ideas.append({override.split("=")[0] for override in proposal.overrides})
    assert len({frozenset(idea) for idea in ideas}) == 3


@pytest.mark.slow
def test_another_transport_is_proposed() -> None:
    plan = planned("weights.transport=broadcast")
    assert plan.proposals[0].overrides == ("weights.transport=colocated",)


def test_every_pack_of_a_step_is_on_the_device() -> None:
    """From the log-probs to the last optimizer step; activations are of one pack at a time."""

    def packs(prompts: int) -> float:
        config = config_of(f"data.prompts_per_step={prompts}")
        stage = fit(config, model_folder(config)).trainer[0]
        return stage.parts["tree packs"] + stage.parts["other tree packs"]

    assert packs(512) == pytest.approx(4 * packs(128))
    assert packs(128) > 100 * (1 << 10) * 128  # hundreds of bytes for each of thousands of tokens a tree


def test_more_processes_of_this_machine_need_more_of_its_memory() -> None:
    def everything(*overrides: str) -> float:
        config = load_config(Path("examples/quickstart.yaml"), overrides)
        return fit(config, model_folder(config)).fullest.need

    assert everything("trainer.parallel.data=4", "engine.count=4") > 2 * everything()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["engine.tensor=1", "engine.count=9"],
            "placement = colocated: engine.count x engine.tensor = 9 x 1",
        ),
        (["plan.node_memory_gib=100"], "host memory of a node: needs"),
        (
            ["plan.devices_per_node=2"],
            "need 8 GPUs and 12 CPUs, 4 of the GPUs on one node; no number of nodes with 2 GPUs holds that",
        ),
        (["weights.transport=broadcast"], "NCCL takes one process a GPU"),
        (["plan.devices_per_node=4", "engine.memory_fraction=0.8"], "weights.transport = colocated"),
        (["engine.max_total_tokens=1000"], "engine: its KV cache holds 1,000 tokens"),
        (["plan.device=a100-40gb", *TOO_LARGE], "trainer, pipeline stage 0: needs"),
    ],
)
def test_the_binding_constraint_is_named(overrides: list[str], problem: str) -> None:
    config = config_of(*overrides)
    found = fit(config, model_folder(config)).problem
    assert found is not None
    assert problem in found
    assert "\n" not in found


@pytest.mark.usefixtures("made_plans")
def test_exit_codes_and_the_document() -> None:
    fits, too_large = run("--json"), run("--json", *TOO_LARGE)
    assert (fits.exit_code, too_large.exit_code) == (0, 2)
    document, refused = json.loads(fits.stdout), json.loads(too_large.stdout)
    assert document["fits"]
    assert document["step"]["seconds"] > 0
    assert document["engine"]["total"] == pytest.approx(sum(document["engine"]["parts"].values()))
    assert not refused["fits"]
    assert refused["step"] is None
    assert refused["proposals"]
    assert refused["assumed"]["device"] == "h100"


def test_the_terminal_says_whether_the_run_fits() -> None:
    fits, too_large = run(), run(*TOO_LARGE)
    assert "8,190,735,360 parameters, 8 x h100 on 1 node of 8" in fits.stdout
    assert "It fits." in fits.stdout
    assert "It does not fit:" in too_large.stdout
    assert "The nearest that fit:" in too_large.stdout


def test_a_model_that_is_not_downloaded_needs_its_shape() -> None:
    with pytest.raises(ConfigError, match=r"models/Qwen3-8B has no config\.json"):
        planned("plan.architecture=null")
    with pytest.raises(ConfigError, match=r"plan\.architecture: examples has no config\.json"):
        planned("plan.architecture=examples")


DISTINCT = [
    "quickstart.yaml",
    "models/*.yaml",
    "cluster/two_nodes.yaml",
    "paper/*.yaml",
    "paper/baselines/*.yaml",
    "paper/ablations/grid-*.yaml",
    "paper/ablations/misaligned-fallback.yaml",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    sorted(path for pattern in DISTINCT for path in (ROOT / "examples").glob(pattern)),
    ids=lambda path: path.stem,
)
def test_every_example_is_planned(path: Path) -> None:
    """The other ablations sample as the paper's run does."""
    plan = make_plan(load_config(path), silent)
    assert plan.fit.problem is None
    assert plan.step is not None
    assert plan.step.seconds > 0
