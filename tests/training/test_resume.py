"""Resuming a run: from which checkpoint, with which lines of its files, and when it is refused."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.checkpoint_damage import as_earlier_version, damages, flip_bit
from tests.support.fake_trainer import FakePool, FakeTrainer, NamedEngine
from tests.support.random_trees import random_tree
from tests.support.routed_trees import with_given_routes
from treepo.config.checkpoint import CheckpointConfig
from treepo.config.load import load_config
from treepo.config.run import RunConfig
from treepo.data.folder_lock import locked
from treepo.data.inputs import TrainInputs
from treepo.data.prompts import DataReport, PromptSet
from treepo.errors import CheckpointError, ConfigError, DataError, DiskError, ModelError
from treepo.training import resume as resume_module
from treepo.training.checkpoint_manifest import CheckpointManifest
from treepo.training.checkpoints import Checkpoints, discard_leftovers, newest
from treepo.training.disk_wait import DiskWait
from treepo.training.ready_trees import ready_trees_lines
from treepo.training.resume import find_resume, last_checkpoint, restore
from treepo.training.run_folder import RunFolder
from treepo.training.run_state import Clock, RunState
from treepo.training.scheduler import ScheduleState
from treepo.training.tree_supply import FinishedTree
from treepo.tree import from_json

DATA = "fingerprint of the data"
DISK = DiskWait(seconds=0)


def state_after(step: int, sizes: dict[str, int] | None = None) -> RunState:
    """No field has its default."""
    return RunState(
        data=DATA,
        steps_done=step,
        schedule=ScheduleState(cursor=4 * step, again=[1], ready=[], began=[]),
        resampled=2,
        accuracy_before=0.25,
        decoded_tokens=100,
        sequential_tokens=150,
        max_logprob_difference=1e-6,
        seconds=60.0,
        phase_seconds={"sample": 7.0},
        sizes=sizes or {"metrics.jsonl": 0},
    )


def inputs(data: str = DATA) -> TrainInputs:
    report = DataReport(Path("train.jsonl"), fingerprint=data)
    return TrainInputs(None, PromptSet(report, None, np.empty((0, 2)), None), {})  # type: ignore[arg-type]  # nothing is read


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.yaml"
    values = {"out": str(tmp_path / "run"), "steps": 9, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "run").mkdir()
    return load_config(path)


def save(checkpoints: Checkpoints, state: RunState) -> None:
    """Begin a checkpoint and complete it."""

    async def scenario() -> None:
        await checkpoints.begin(state)
        await checkpoints.finish()

    asyncio.run(scenario())


def write_run(config: RunConfig, steps: int, saved: int) -> None:
    """Write a run that was killed after `steps` steps, with a checkpoint of the step `saved`."""
    checkpoints = Checkpoints(config.out, config.checkpoint, config.steps, FakeTrainer(), DISK)
    with RunFolder(config) as folder:
        write_steps(folder, range(1, saved + 1))
        save(checkpoints, state_after(saved, asyncio.run(folder.sizes())))
        write_steps(folder, range(saved + 1, steps + 1))


def write_steps(folder: RunFolder, steps: range) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        for number in range(2):
            folder.write_tree(random_tree(rng, f"p{number}", vocabulary=9, max_depth=2), step, "1")
        folder.write_metrics(step, {"reward": step / 10, "accuracy": float("nan")})


def test_checkpoints_come_every_so_many_steps_and_at_the_end(config: RunConfig) -> None:
    checkpoints = Checkpoints(config.out, CheckpointConfig(every=4), config.steps, FakeTrainer(), DISK)
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [4, 8, 9]
    none = Checkpoints(config.out, CheckpointConfig(every=None), config.steps, FakeTrainer(), DISK)
    assert not any(none.due(step) for step in range(1, 10))


@pytest.mark.parametrize("keep", [1, 3, None])
def test_the_newest_checkpoints_stay(config: RunConfig, keep: int | None) -> None:
    """Counted by step, not by name: 9 is before 10."""
    checkpoints = Checkpoints(config.out, CheckpointConfig(keep=keep), config.steps, FakeTrainer(), DISK)
    for step in (9, 10, 100_000):
        save(checkpoints, state_after(step))
        found = newest(config.out)
        assert found is not None
        assert found[1] == state_after(step)
    names = ["step-00009", "step-00010", "step-100000"]
    entries = sorted(entry.name for entry in (config.out / "checkpoints").iterdir())
    assert entries == names[-keep:] if keep else names


@pytest.mark.parametrize("awaited", [False, True])
def test_a_checkpoint_is_complete_once_it_is_written_or_awaited(config: RunConfig, awaited: bool) -> None:
    """Also while nobody awaits it, as while the next step is sampled."""
    trainer = FakeTrainer()
    checkpoints = Checkpoints(config.out, CheckpointConfig(), config.steps, trainer, DISK)
    trainer.written = False

    async def scenario() -> None:
        await checkpoints.begin(state_after(2))
        await asyncio.sleep(0.01)
        assert newest(config.out) is None, "the ranks still write"
        trainer.written = not awaited
        if awaited:
            await checkpoints.finish()
        while newest(config.out) is None:
            await asyncio.sleep(0.01)
        await checkpoints.finish()

    asyncio.run(scenario())


def test_a_run_folder_that_is_gone_is_not_made_again(config: RunConfig) -> None:
    """As one on a disk that was unmounted: another disk is below it."""
    checkpoints = Checkpoints(config.out, CheckpointConfig(), config.steps, FakeTrainer(), DISK)
    config.out.rmdir()
    with pytest.raises(DiskError, match="No such file or directory"):
        save(checkpoints, state_after(2))
    assert not config.out.exists()


def test_a_checkpoint_that_nobody_awaits_is_left_unfinished(config: RunConfig) -> None:
    trainer = FakeTrainer()
    checkpoints = Checkpoints(config.out, CheckpointConfig(), config.steps, trainer, DISK)
    trainer.written = False

    async def scenario() -> None:
        await checkpoints.begin(state_after(2))
        await checkpoints.cancel()

    asyncio.run(scenario())
    assert newest(config.out) is None


def test_a_killed_run_goes_on_as_if_it_had_not_been(config: RunConfig, tmp_path: Path) -> None:
    write_run(config, steps=5, saved=2)
    (config.out / "checkpoints" / ".step-00004.partial").mkdir()
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')
    resume = find_resume(config, inputs())
    assert resume is not None
    assert resume.state.steps_done == 2
    with RunFolder(config, resume.state) as folder:
        write_steps(folder, range(3, 6))

    straight = config.model_copy(update={"out": tmp_path / "straight"})
    write_run(straight, steps=5, saved=2)
    assert (config.out / "trees.jsonl").read_bytes() == (straight.out / "trees.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert plotted(config.out) == plotted(straight.out) == [(step, np.float32(step / 10)) for step in steps]
    assert [entry.name for entry in (config.out / "checkpoints").iterdir()] == ["step-00002"]
    for line in (config.out / "trees.jsonl").read_bytes().splitlines():
        from_json(line)


def plotted(out: Path) -> list[tuple[int, float]]:
    """The rewards that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("reward")]


def test_a_finished_run_goes_on_if_it_gets_more_steps(config: RunConfig) -> None:
    short = config.model_copy(update={"steps": 2})
    write_run(short, steps=2, saved=2)
    (config.out / "summary.json").write_text("{}")
    (config.out / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match="complete after 2 steps, and steps = 2"):
        find_resume(short, inputs())
    resume = find_resume(config, inputs())
    assert resume is not None
    assert resume.changes == ("steps = 2, now 9",)
    with RunFolder(config, resume.state):
        pass
    assert not (config.out / "checkpoint").exists()
    assert (config.out / "previous-1" / "summary.json").exists()
    assert load_config(config.out / "config.yaml") == config


def test_a_run_without_a_checkpoint_begins(config: RunConfig) -> None:
    assert find_resume(config, inputs()) is None
    with RunFolder(config) as folder:
        write_steps(folder, range(1, 3))
    assert find_resume(config, inputs()) is None


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"seed": 7}, "seed = 0, now 7"),
        ({"sampling": {"width": 4}}, "sampling.width = 16, now 4"),
        (
            {"trainer": {"optimizer": {"weight_decay": 0.5}}},
            "trainer.optimizer.weight_decay = 0.1, now 0.5",
        ),
        ({"data": {"train": "other.jsonl"}}, 'data.train = "t.jsonl", now "other.jsonl"'),
    ],
)
def test_another_run_is_refused(config: RunConfig, changed: dict[str, Any], line: str) -> None:
    write_run(config, steps=3, saved=2)
    values = config.model_dump()
    for section, value in changed.items():
        values[section] = merged(values[section], value)
    with pytest.raises(ConfigError) as error:
        find_resume(RunConfig.model_validate(values), inputs())
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_cannot_come_or_change(config: RunConfig) -> None:
    write_run(config, steps=3, saved=2)
    values = config.model_dump()
    values["trainer"]["lora"] = {"rank": 8}
    with pytest.raises(ConfigError, match=r"trainer\.lora\.rank = nothing, now 8"):
        find_resume(RunConfig.model_validate(values), inputs())


def merged(old: Any, new: Any) -> Any:
    return (
        old | {key: merged(old[key], value) for key, value in new.items()} if isinstance(new, dict) else new
    )


def test_layout_engines_and_learning_rate_may_change(config: RunConfig) -> None:
    write_run(config, steps=3, saved=2)
    values = config.model_dump()
    values["trainer"]["parallel"]["tensor"] = 2
    values["trainer"]["optimizer"] |= {
        "learning_rate": 1e-7,
        "warmup_steps": 20,
        "schedule": "linear",
        "decay_steps": 30,
    }
    values["engine"]["count"] = 3
    resume = find_resume(RunConfig.model_validate(values), inputs())
    assert resume is not None
    assert resume.changes == (
        "trainer.parallel.tensor = 1, now 2",
        "trainer.optimizer.learning_rate = 1e-06, now 1e-07",
        "trainer.optimizer.warmup_steps = 10, now 20",
        'trainer.optimizer.schedule = "constant", now "linear"',
        "trainer.optimizer.decay_steps = null, now 30",
        "engine.count = 1, now 3",
    )


def test_routing_replay_may_change_unless_trees_that_wait_lack_routes(config: RunConfig) -> None:
    checkpoints = Checkpoints(config.out, config.checkpoint, config.steps, FakeTrainer(), DISK)

    def saved(step: int, *waiting: int) -> None:
        schedule = ScheduleState(cursor=4 * step, again=[], ready=list(waiting), began=[0] * len(waiting))
        trees = {number: FinishedTree(random_tree(np.random.default_rng(0)), "1") for number in waiting}

        async def scenario() -> None:
            await checkpoints.begin(replace(state_after(step), schedule=schedule), ready_trees_lines(trees))
            await checkpoints.finish()

        asyncio.run(scenario())

    with RunFolder(config) as folder:
        write_steps(folder, range(1, 2))
    rollout, trainer = (
        config.model_copy(
            update={"trainer": config.trainer.model_copy(update={"routing_replay": routing_replay})}
        )
        for routing_replay in ("rollout", "trainer")
    )
    saved(1)
    for changed, value in ((rollout, "rollout"), (trainer, "trainer")):
        resume = find_resume(changed, inputs())
        assert resume is not None
        assert resume.changes == (f'trainer.routing_replay = "none", now "{value}"',)
    saved(2, 3, 5)
    assert find_resume(trainer, inputs()) is not None
    line = "trainer.routing_replay = rollout, but 2 trees that wait for a step were sampled without routes"
    with pytest.raises(ConfigError, match=line):
        find_resume(rollout, inputs())


def test_routes_of_waiting_trees_are_dropped_unless_they_are_replayed(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trees that are sampled from now on have none, and a batch has routes in all trees or in none."""
    write_run(config, steps=2, saved=1)
    tree = random_tree(np.random.default_rng(0))
    routed = with_given_routes(tree, lambda _, tokens: np.zeros((tokens, 2, 1), np.uint8))
    waiting = replace(state_after(1), schedule=ScheduleState(4, again=[], ready=[3], began=[0]))
    monkeypatch.setattr(resume_module, "read_ready_trees", lambda _: {3: FinishedTree(routed, "1")})
    monkeypatch.setattr(resume_module, "newest", lambda *_, **__: (config.out, waiting))
    for routing_replay in ("none", "trainer", "rollout"):
        trainer = config.trainer.model_copy(update={"routing_replay": routing_replay})
        resume = find_resume(config.model_copy(update={"trainer": trainer}), inputs())
        again = last_checkpoint(config.model_copy(update={"trainer": trainer}))
        for each in (resume, again):
            assert each is not None
            found = each.ready_trees[3].tree
            has_routes = [found.prompt_routes is not None]
            has_routes += [segment.routes is not None for segment in found.segments]
            assert has_routes == [routing_replay == "rollout"] * (len(tree.segments) + 1)


def test_other_data_is_refused(config: RunConfig) -> None:
    write_run(config, steps=3, saved=2)
    with pytest.raises(ConfigError, match=r"the prompts or answers in .* have changed since"):
        find_resume(config, inputs("of other data"))


def test_devices_of_another_dtype_are_refused(config: RunConfig) -> None:
    """`model.dtype: auto` on GPUs, when the checkpoint is of a run on CPUs."""
    write_run(config, steps=3, saved=2)
    resume = find_resume(config, inputs())
    assert resume is not None
    trainer = FakeTrainer()
    trainer.dtype = "bfloat16"
    with pytest.raises(ConfigError, match=r"a run in float32, and model\.dtype = auto is bfloat16"):
        asyncio.run(restore(resume, FakePool(NamedEngine(), []), trainer))


def test_a_file_that_lost_lines_is_refused(config: RunConfig) -> None:
    write_run(config, steps=3, saved=2)
    (config.out / "trees.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"trees\.jsonl has 0 bytes, but had \d+ after step 2"):
        find_resume(config, inputs())


FILE = "trainer/__0_0.distcp"


@pytest.fixture
def three(config: RunConfig) -> RunConfig:
    """A killed run with checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        folder = folder_of(config, step)
        (folder / "trainer").mkdir(parents=True)
        (folder / FILE).write_bytes(b"nine byte")
        (folder / "ready_trees.jsonl").write_bytes(b"")
        CheckpointManifest("float32", True, step, {}, asdict(state_after(step))).write(folder)
    with RunFolder(config.model_copy(update={"out": config.out / "aside"})) as files:
        write_steps(files, range(1, 7))
    for name in ("metrics.jsonl", "trees.jsonl", "config.yaml"):
        (config.out / "aside" / name).rename(config.out / name)
    return config


def folder_of(config: RunConfig, step: int) -> Path:
    return config.out / "checkpoints" / f"step-{step:05d}"


@pytest.mark.parametrize("how", damages(FILE))
def test_damaged_checkpoints_are_passed_over_and_kept_aside(
    three: RunConfig, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, message = damages(FILE)[how]
    for step in (4, 6):
        damage(folder_of(three, step))
    resume = find_resume(three, inputs())
    assert resume is not None
    assert resume.checkpoint == folder_of(three, 2)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    for line, step in zip(said, (6, 4), strict=True):
        assert message in line
        assert line.endswith(f"; step-{step:05d} is passed over")
        assert "\n" not in line
    with RunFolder(three, resume.state):
        pass
    checkpoints = Checkpoints(three.out, CheckpointConfig(keep=1), three.steps, FakeTrainer(), DISK)
    save(checkpoints, state_after(4))
    names = sorted(entry.name for entry in (three.out / "checkpoints").iterdir())
    assert names == ["step-00004", "step-00004.damaged", "step-00006.damaged"]


def test_damaged_twice(three: RunConfig) -> None:
    for _ in range(2):
        folder_of(three, 6).mkdir(exist_ok=True)
        discard_leftovers(three.out, 4)
    names = sorted(entry.name for entry in (three.out / "checkpoints").iterdir())
    assert names == ["step-00002", "step-00004", "step-00006.damaged", "step-00006.damaged-2"]


def test_without_a_whole_checkpoint_nothing_begins(three: RunConfig) -> None:
    for step in (2, 4, 6):
        flip_bit(folder_of(three, step) / FILE)
    with pytest.raises(ModelError, match="none of 3 checkpoints is whole") as error:
        find_resume(three, inputs())
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_a_later_version_is_not_passed_over(three: RunConfig) -> None:
    path = folder_of(three, 6) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": 4}))
    with pytest.raises(ModelError, match="format 4; this version reads 2 and 3"):
        newest(three.out)


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_warning(
    three: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    as_earlier_version(folder_of(three, 6), files={})
    found = newest(three.out)
    assert found is not None
    assert found[0] == folder_of(three, 6)
    assert "it has no checksums" in caplog.text


def test_a_checkpoint_that_fails_leaves_the_one_before(config: RunConfig) -> None:
    trainer = FakeTrainer()
    checkpoints = Checkpoints(config.out, CheckpointConfig(keep=1), config.steps, trainer, DISK)
    save(checkpoints, state_after(2))

    def fail(method: str) -> None:
        if method == "finish_save":
            assert folder_of(config, 2).is_dir()
            raise CheckpointError("the disk returns another content than was written")

    trainer.before = fail
    with pytest.raises(DiskError):
        save(checkpoints, state_after(4))
    found = newest(config.out)
    assert found is not None
    assert found[1] == state_after(2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"metrics\.jsonl:3: not JSON"),
        ("[" * 100_000, r"metrics\.jsonl:3: not JSON"),
        ("[]", r"metrics\.jsonl:3: not the numbers of a step"),
        ('{"step": 2}', r"metrics\.jsonl:3: not the numbers of a step"),
        ('{"step": 3, "time": 1.5, "reward": "x"}', r"metrics\.jsonl:3: not the numbers of a step"),
    ],
)
def test_a_line_of_the_metrics_that_no_run_wrote_is_named(config: RunConfig, line: str, message: str) -> None:
    write_run(config, steps=2, saved=2)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    found = find_resume(config, inputs())
    assert found is not None
    found.state.sizes["metrics.jsonl"] = (config.out / "metrics.jsonl").stat().st_size
    with pytest.raises(DataError, match=message):
        RunFolder(config, found.state).__enter__()
    with locked(config.out):
        pass  # the failed start has let the folder go


def test_the_state_survives_its_file() -> None:
    state = state_after(3, {"trees.jsonl": 5})
    assert RunState.of_manifest(json.loads(json.dumps(asdict(state)))) == state


class Silent:
    """A `Reporter`."""

    def phase(self, name: str, announce: bool = False) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def recovered(self, event: str) -> None: ...


def test_times_go_on_where_they_were() -> None:
    state = state_after(3)
    clock = Clock(state, Silent())
    clock.count("sample", 2.0)
    clock.count("weight sync", 1.0)
    assert state.phase_seconds == {"sample": 9.0, "weight sync": 1.0}
    assert state.seconds >= 60.0
    assert clock.take_step_seconds()[0] == {"sample": 2.0, "weight sync": 1.0}
    with clock.phase("sample"):
        pass
    assert list(clock.take_step_seconds()[0]) == ["sample"]
