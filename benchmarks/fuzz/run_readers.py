"""The files of runs, checkpoints and evaluations."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.fuzz.loop import BadError, Reader
from benchmarks.fuzz.readers import MARK, emptied, joined, write_files
from tests.support.evaluations import config_of, document, graded_problem, prompt_of
from tests.support.random_trees import random_tree, with_draws, with_routes
from tests.support.run_folders import write_run_folder
from treepo.errors import DataError, ModelError
from treepo.tree import Tree, Verdict, from_json, to_json

_TREE_WORDS = (
    b'"parent":',
    b'"version":[[0,1],[1,1]]',
    b'"finish":"cut"',
    b'"stop":"boxed"',
    b'"verdict":null',
    b'"terms":{"a":1}',
    b'"tokens":[]',
    b'"log_probs":[null]',
    b'"reward":1e400',
    b"-0.0",
    b'"segment":',
    b'"dtype":"uint16"',
    b'"shape":[1,3,2]',
    b'"base64":"/////w=="',
)


def trees(folder: Path) -> Reader:
    """trees.jsonl and ready_trees.jsonl."""
    from treepo.training.ready_trees import read_ready_trees

    path = folder / "trees.jsonl"
    draws = np.random.default_rng(0)
    plain = [random_tree(draws, max_depth=depth) for depth in (1, 2, 3)]
    routed = [with_routes(with_draws(tree, draws), draws) for tree in plain[:2]]
    seeds = [
        to_json(tree, routes=True, position=position, answer="7")
        for position, tree in enumerate([*plain, *routed])
    ]

    def read(data: bytes) -> object:
        path.write_bytes(data)
        for finished in read_ready_trees(path).values():
            _check_again(finished.tree)
        return _check_again(from_json(data.split(b"\n")[0]))

    return Reader("trees", read, seeds, _TREE_WORDS, (ModelError, ValueError, OverflowError))


def viewed_trees(folder: Path) -> Reader:
    """trees.jsonl as `treepo view` reads it: a line that is not a tree never keeps it from showing others."""
    from treepo.view.part import json_text
    from treepo.view.sources import Source
    from treepo.view.trees import trees_part

    path = folder / "trees.jsonl"
    draws = np.random.default_rng(0)
    seeds = [to_json(random_tree(draws, max_depth=depth), step=1, answer="7") for depth in (1, 2, 3)]
    source = Source("run", folder, path)

    def read(data: bytes) -> object:
        path.write_bytes(data + b"\n" + seeds[0])
        ask = trees_part([source]).answers
        rows: Any = {"more": True}
        while rows["more"]:
            rows = json.loads(json_text(ask["rows"]({"source": "0", "from": "0", "mark": ""})))
        answers = [rows, ask["prompts"]({"source": "0"})]
        last = len(rows["columns"]["prompt"]) - 1
        if str(last) in rows["faults"]:
            raise BadError("a good tree is not shown")
        for tree in range(last, -1, -1):  # the good one cannot fail
            query = {"source": "0", "tree": str(tree), "node": "1", "from": "0"}
            answers += [ask["tree"](query), ask["text"](query)]
        return json_text(answers)

    return Reader("viewed_trees", read, seeds, _TREE_WORDS, (DataError,))


def _check_again(tree: Tree) -> Tree:
    """What is accepted can be used: written, and read as the same."""
    written = to_json(tree, routes=True)
    if to_json(from_json(written), routes=True) != written:
        raise BadError("a tree that is written and read is another")
    for leaf in tree.leaves:
        tree.response(leaf)
    return tree


def viewed_run(folder: Path) -> Reader:
    """The files that the tab "Run" of `treepo view` reads, each of them alone the cause of an error."""
    from treepo.view.part import json_text
    from treepo.view.run import run_part
    from treepo.view.sources import Source

    seed, run = folder / "seed", folder / "run"
    write_run_folder(seed)
    whole = {path.name: path.read_bytes() for path in seed.iterdir() if path.name != "trees.jsonl"}
    ask = run_part([Source("run", run, run / "trees.jsonl")]).answers

    def read(data: bytes) -> object:
        with emptied(run):
            write_files(data, run, tuple(whole))
            return [json_text(answer({"source": "0"})) for answer in ask.values()]

    words = (b"\n", b'"step":', b'"time":', b"WARNING", b"2026-02-30 00:00:00,000 INFO a: ", b"NaN", b"1e999")
    return Reader("viewed_run", read, [joined(whole)], words)


def checkpoint(folder: Path) -> Reader:
    """checkpoint.json, with the run's state in it."""
    from treepo.training.checkpoint_manifest import MANIFEST, CheckpointManifest, read_manifest
    from treepo.training.run_state import RunState
    from treepo.training.scheduler import ScheduleState

    state = RunState("d", 3, ScheduleState(9, [7], [5, 6], [1, 2], [8]), sizes={"trees.jsonl": 9})
    state.phase_seconds["train"] = 0.5
    manifest = CheckpointManifest("bfloat16", True, 7, {"tensor": 2, "sequence": True}, asdict(state))
    seeds = [
        json.dumps({"format": version} | asdict(manifest) | {"files": {"a": 1}}).encode()
        for version in (1, 2, 3)
    ]
    words = (
        b'"../a"',
        b'"/dev/zero"',
        b'"files":',
        b'"format": 2',
        b'"run":',
        b'"cursor":',
        b'"sizes":',
        b'"layout":',
    )

    def read(data: bytes) -> object:
        with emptied(folder / "step-3") as place:
            (place / "a").write_bytes(b"1")
            (place / MANIFEST).write_bytes(data)
            found = read_manifest(place)
            try:
                return RunState.of_manifest(found.run).steps_done
            except ValueError as error:
                raise ModelError(str(error)) from None

    return Reader("checkpoint", read, seeds, words)


def metrics(folder: Path) -> Reader:
    """metrics.jsonl of a run that resumes, and TensorBoard's record of it."""
    from treepo.training.event_file import scalars_event
    from treepo.training.run_folder import read_metrics

    path = folder / "metrics.jsonl"
    seeds = (
        b'{"step": 1, "time": 1.5, "reward": 0.5, "accuracy": null}\n{"step": 2, "time": 2, "reward": 1}\n',
        b'{"step": 0, "time": 1.0, "heldout/accuracy": 0.25}\n',
    )

    def read(data: bytes) -> object:
        path.write_bytes(data)
        for record in read_metrics(path):
            values = {name: value for name, value in record.items() if name not in ("step", "time")}
            step, seconds = record["step"], record["time"]
            assert isinstance(step, int)
            assert seconds is not None
            scalars_event(step, seconds, values)
        return None

    return Reader("metrics", read, seeds, (b'"step":', b'"time":', b"1e400", b"10000000000000000000000"))


def evaluation(folder: Path) -> Reader:
    """trees.jsonl and samples.jsonl of an evaluation that continues."""
    from treepo.evaluation import folder as module
    from treepo.evaluation.folder import SAMPLES, EvaluationFolder, SessionCost

    out = folder / "evaluation"
    settings = config_of(str(out), 2)
    prompts = {f"b:{number}": prompt_of("b", number) for number in range(2)}
    with EvaluationFolder(settings, prompts, "model") as files:
        for prompt in prompts.values():
            graded = graded_problem(prompt, [Verdict.CORRECT, Verdict.WRONG])
            files.write(graded, SessionCost(0, 1, 1.0, 2, 3, 4, 5, 6))
    config = (out / "config.yaml").read_bytes()
    names = ("trees.jsonl", SAMPLES)
    whole = {name: (out / name).read_bytes() for name in names}
    seeds = [joined(whole), joined(whole | {SAMPLES: whole[SAMPLES][:-9]})]

    def read(data: bytes) -> object:
        with emptied(out) as place:
            (place / "config.yaml").write_bytes(config)
            write_files(data, place, names)
            # Reading config.yaml takes most of the time, and is another reader.
            with mock.patch.object(module, "_check_same"):
                found = EvaluationFolder(settings, prompts, "model")
            return len(list(found.problems())) if found.results else 0

    words = (
        *_TREE_WORDS,
        b'"classes":',
        b'"spent":',
        b'"problem":',
        MARK + b"samples.jsonl\x1f",
        b'"answers":',
    )
    return Reader("evaluation", read, seeds, words)


def results(folder: Path) -> Reader:
    """results.json of an evaluation that is compared."""
    from treepo.evaluation.comparison import compare, different_conditions
    from treepo.evaluation.report.plot import accuracy_plot, curve
    from treepo.evaluation.results import read_results

    problems = [
        (prompt, graded_problem(prompt, [Verdict.CORRECT, Verdict.WRONG]))
        for prompt in (prompt_of("b", number) for number in range(2))
    ]
    good = document(config_of("out", 2), {"b": problems})
    path = folder / "results.json"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        found = read_results(path)
        warning = different_conditions(good, found)
        return warning, compare(good, found), compare(found, found), accuracy_plot([curve(found, "x")])

    words = (b'"mean":', b'"pass@1":', b'"value":', b'"problems":', b'"unique":', b'"width":', b'"metrics":')
    return Reader("results", read, [json.dumps(good).encode()], words)


def metadata(folder: Path) -> Reader:
    """.metadata of a distributed checkpoint, a pickle, and the file of a tensor."""
    import torch

    from megatron_bridge.distributed_checkpoint import (
        DistributedCheckpointReader,
        write_distributed_checkpoint,
    )

    seed = folder / "seed"
    seed.mkdir()
    tensors: dict[str, Any] = {
        "a": (torch.Size([2, 3]), torch.float32),
        "b": (torch.Size([1]), torch.bfloat16),
    }
    write_distributed_checkpoint(
        seed, tensors, lambda key: torch.ones(tensors[key][0], dtype=tensors[key][1])
    )
    names = tuple(path.name for path in seed.iterdir())
    words = (
        b"cposix\nsystem\n(S'exit 7'\ntR",
        b"cbuiltins\neval\n",
        b"\x93",
        b"R",
        b".",
        b"../a",
        b"c__builtin__\nbytearray\n(I99999999999\ntR",
        b"ctorch\nload\n",
    )

    def read(data: bytes) -> object:
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        (folder / "trainer").mkdir()
        write_files(data, folder / "trainer", names)
        reader = DistributedCheckpointReader(folder / "trainer")
        return [reader.read(key) for key in tensors]

    whole = {name: (seed / name).read_bytes() for name in names}
    return Reader("metadata", read, [joined(whole)], words, share=0.5, growth=3 << 29)
