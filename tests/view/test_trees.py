"""What the tab "Trees" asks its server: rows, questions, trees, texts, and what an exported page has."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.command import write_model_and_problems
from tests.support.fake_trainer import FakeTrainer
from tests.support.random_trees import random_tree
from tests.support.small_trees import tree_of
from tests.support.training_runs import LengthRewards, Run, config_of, use_rewards
from treepo.errors import DataError
from treepo.learning.packing import Pack
from treepo.protocols import BatchResult, MiniBatch
from treepo.toy.byte_tokenizer import byte_tokenizer
from treepo.tree import PROMPT, Cut, Segment, Tree, to_json
from treepo.view import trees as module
from treepo.view.part import json_text
from treepo.view.sources import find_sources
from treepo.view.trees import trees_part
from treepo.view.trees_text import TokenTexts, questions

Ask = Callable[..., Any]
TOKENIZER = byte_tokenizer(512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    TOKENIZER.hugging_face.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and problems, on which a run with fakes trains."""
    folder = tmp_path_factory.mktemp("problems")
    write_model_and_problems(folder, folder / "problems.jsonl", 9)
    return folder


def asker(path: Path) -> Ask:
    """Asks about the trees of one source, and makes JSON of the answer as the server does."""
    part = trees_part(find_sources([path]))

    def ask(question: str, **query: object) -> Any:
        texts = {name: str(value) for name, value in query.items()}
        return json.loads(json_text(part.answers[question]({"source": "0"} | texts)))

    return ask


def run_of(folder: Path, lines: Sequence[bytes], **config: object) -> Path:
    """A run folder with these trees."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "trees.jsonl").write_bytes(b"".join(lines))
    return folder


def with_texts(tree: Tree, prompt: str, texts: Sequence[bytes]) -> Tree:
    """The tree with this prompt, and a segment for each text, of a token a byte."""

    def segment(segment: Segment, text: bytes) -> Segment:
        tokens = np.array([VOCABULARY[SYMBOLS[byte]] for byte in text], dtype=np.int32)
        log_probs = np.full(len(tokens), -0.25, dtype=np.float32)
        return dataclasses.replace(
            segment, tokens=tokens, log_probs=log_probs, versions=np.zeros_like(tokens)
        )

    rendered = TOKENIZER.encode(TOKENIZER.render([{"role": "user", "content": prompt}]))
    return dataclasses.replace(tree, prompt=rendered, segments=tuple(map(segment, tree.segments, texts)))


def byte_symbols() -> list[str]:
    """The symbol of each byte, as in GPT-2's byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


SYMBOLS, VOCABULARY = byte_symbols(), TOKENIZER.hugging_face.get_vocab()


def test_rows_come_in_pieces_and_begin_again_after_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 3)
    rng = np.random.default_rng(0)
    lines = [to_json(random_tree(rng, f"p:{number % 4}"), step=number, answer="7") for number in range(8)]
    folder = run_of(tmp_path / "run", lines[:7])
    ask = asker(folder)
    answers = [ask("rows", **{"from": 0, "mark": ""})]
    while answers[-1]["more"]:
        start = answers[-1]["start"] + len(answers[-1]["columns"]["step"])
        answers.append(ask("rows", **{"from": start, "mark": answers[-1]["mark"]}))
    assert [answer["columns"]["step"] for answer in answers] == [[0, 1, 2], [3, 4, 5], [6]]
    prompts = [prompt for answer in answers for prompt in answer["prompts"]]
    named = [prompts[number][0] for answer in answers for number in answer["columns"]["prompt"]]
    assert named == [f"p:{number % 4}" for number in range(7)]

    (folder / "trees.jsonl").write_bytes(b"".join(lines))
    grown = ask("rows", **{"from": 7, "mark": answers[-1]["mark"]})
    assert (grown["start"], grown["columns"]["step"], grown["more"]) == (7, [7], False)
    (folder / "trees.jsonl").write_bytes(b"".join([*lines[:6], lines[7]]))
    for start, mark in ((7, answers[-1]["mark"]), (8, grown["mark"]), (99, "x")):
        anew = ask("rows", **{"from": start, "mark": mark})
        assert (anew["start"], anew["columns"]["step"]) == (0, [0, 1, 2])


def test_segments_say_which_cut_added_them_and_for_how_many_children_they_stand(tmp_path: Path) -> None:
    tree = tree_of([-1, 0, 0, -1], [0.0, 0.0, 0.0])
    cuts = (Cut(0, (2,), leaf=1, leaves=1, right=0, graded=1), Cut(PROMPT, (3,), leaf=None, leaves=2))
    drawn = dataclasses.replace(tree.segments[1], draws=3)
    tree = dataclasses.replace(tree, segments=(tree.segments[0], drawn, *tree.segments[2:]))
    lines = [to_json(dataclasses.replace(tree, cuts=cuts)), to_json(dataclasses.replace(tree, agreed=True))]
    ask = asker(run_of(tmp_path / "run", lines))
    ask("rows", **{"from": 0, "mark": ""})
    answer = ask("tree", tree=0)
    assert [segment["cut"] for segment in answer["segments"]] == [
        None,
        None,
        {"leaf": 2, "right": 0, "graded": 1},
        {"leaf": None, "right": None, "graded": None},
    ]
    assert [segment["draws"] for segment in answer["segments"]] == [1, 3, 1, 1]
    assert answer["agreed"] is False
    assert ask("tree", tree=1)["agreed"] is True


def test_a_tree_with_its_grades_and_what_makes_no_json(tmp_path: Path) -> None:
    tree = tree_of([-1, 0, 0, -1], [1e308, 1e308, None])
    line = to_json(tree, step=3, answer="7", answers=["7", None, "8"])
    ask = asker(run_of(tmp_path / "run", [line, b"nonsense\n"]))
    rows = ask("rows", **{"from": 0, "mark": ""})
    assert rows["columns"]["reward"] == [None, None]  # the sum is not finite
    assert rows["faults"] == {"1": "not a tree: JSON is malformed: invalid character (byte 4)"}
    answer = ask("tree", tree=0)
    assert (answer["id"], answer["answer"], answer["step"], answer["prompt_tokens"]) == ("p", "7", 3, 2)
    assert [segment["parent"] for segment in answer["segments"]] == [0, 1, 1, 0]
    assert [segment["reward"] for segment in answer["segments"]] == [None, 1e308, 1e308, None]
    assert [leaf["node"] for leaf in answer["leaves"]] == [2, 3, 4]
    assert [leaf["answer"] for leaf in answer["leaves"]] == ["7", None, "8"]
    assert answer["untrained"] == "the trees were not trained"
    for wrong in ({"tree": 2}, {"tree": -1}, {"tree": "x"}, {"tree": ""}, {"tree": 1}):
        with pytest.raises(DataError):
            ask("tree", **wrong)


def test_a_token_has_the_text_that_it_adds(tmp_path: Path, model: Path) -> None:
    texts = ["a = π".encode(), "π".encode()[:1], "π".encode()[1:] + b"!", b"\xff"]
    tree = with_texts(tree_of([-1, 0, 1, 0], [1.0, 0.0]), "Why?", texts)
    ask = asker(run_of(tmp_path / "run", [to_json(tree)], model={"path": str(model)}))
    ask("rows", **{"from": 0, "mark": ""})
    found = [ask("text", tree=0, node=node, **{"from": 0}) for node in range(5)]
    assert "".join(found[0]["texts"]) == "<|user|>Why?<|eos|><|assistant|>"
    assert [answer["texts"] for answer in found[1:]] == [
        ["a", " ", "=", " ", "", "π"],
        ["\ufffd"],  # the first half of a character,
        ["π", "!"],  # which the second half completes
        ["\ufffd"],
    ]
    assert found[0]["log_probs"] is None
    assert found[1]["log_probs"] == [-0.25] * 6
    assert ask("text", tree=0, node=1, **{"from": 5})["texts"] == ["π"]
    for wrong in ({"node": 5, "from": 0}, {"node": 0, "from": 99}):
        with pytest.raises(DataError):
            ask("text", tree=0, **wrong)


def test_a_long_segment_comes_in_pieces(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TOKENS", 3)
    tree = with_texts(tree_of([-1], [1.0]), "Why?", ["aπb😀c".encode()])
    ask = asker(run_of(tmp_path / "run", [to_json(tree)], model={"path": str(model)}))
    ask("rows", **{"from": 0, "mark": ""})
    pieces = [ask("text", tree=0, node=1, **{"from": start})["texts"] for start in (0, 3, 6, 9)]
    assert pieces == [["a", "", "π"], ["b", "\ufffd", "\ufffd"], ["", "😀", "c"], []]


@pytest.mark.parametrize("config", [{}, {"model": {"path": "nowhere"}}, {"model": 3}])
def test_without_a_tokenizer_tokens_are_numbers(tmp_path: Path, config: dict[str, object]) -> None:
    ask = asker(run_of(tmp_path / "run", [to_json(tree_of([-1], [1.0], [3]))], **config))
    ask("rows", **{"from": 0, "mark": ""})
    answer = ask("text", tree=0, node=1, **{"from": 0})
    assert answer["texts"] == ["⟨0⟩", "⟨1⟩", "⟨2⟩"]
    assert "model folder is needed" in answer["missing"]
    assert ask("prompts")["questions"] == ["p"]


def test_tokens_beyond_the_vocabulary_are_numbers(model: Path) -> None:
    texts = TokenTexts([model])
    tokens = np.array([99_999, -1, 2**31 - 1], dtype=np.int32)
    assert texts.texts(tokens, tokens) == ["⟨99999⟩", "⟨-1⟩", "⟨2147483647⟩"]
    assert texts.decode([tokens]) == [""]


def test_a_question_is_what_prompts_do_not_share() -> None:
    frame = "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is {} plus {}?<|end|>\n<|assistant|>\n"
    prompts = [frame.format(one, other) for one, other in ((1, 2), (1, 5), (13, 2))]
    assert questions(prompts) == ["What is 1 plus 2?", "What is 1 plus 5?", "What is 13 plus 2?"]
    assert questions(["What is 1?", "What is 2?"]) == ["What is 1?", "What is 2?"]
    assert questions([prompts[0]]) == [prompts[0].strip()]
    assert questions([prompts[0]] * 2) == [prompts[0].strip()] * 2
    assert questions(["a\nb", "a\nb\nc", "a\n"]) == ["b", "b\nc", "a\n"]
    assert questions([]) == []
    assert len(questions(["x" * 5000])[0]) < 500


class WatchedTrainer(FakeTrainer):
    """packs: of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.packs: list[list[Pack]] = []

    async def train_batch(self, mini_batches: Sequence[MiniBatch], temperature: float) -> BatchResult:
        self.packs.append([pack for one in mini_batches for replica in one.packs for pack in replica])
        return await super().train_batch(mini_batches, temperature)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learning": {"dynamic_sampling": True, "mini_batches": 1, "estimator": "grpo"}},
        {"learning": {"packing": "tree", "estimator": "spo"}, "reward": {"terms": {"length": 0.5}}},
    ],
)
def test_weights_are_those_that_the_run_trained_with(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    use_rewards(monkeypatch, LengthRewards())
    trainer = WatchedTrainer()
    settings = {"data": {"heldout": None}, "log_prob_check": {"enabled": False}} | changes
    Run(config_of(problems, tmp_path / "run", steps=2, **settings), trainer=trainer).train()
    ask = asker(tmp_path / "run")
    steps = ask("rows", **{"from": 0, "mark": ""})["columns"]["step"]
    shown: dict[int, list[list[float]]] = {step: [] for step in (1, 2)}
    for number, step in enumerate(steps):
        answer = ask("tree", tree=number)
        dropped = answer["untrained"] is not None
        assert dropped == all(segment["weights"] is None for segment in answer["segments"])
        for segment in answer["segments"] if not dropped else []:
            shown[step] += [segment["weights"]] * segment["tokens"]
    for step, packs in enumerate(trainer.packs, start=1):
        columns = [
            np.stack([pack.advantage_pos, pack.advantage_neg, pack.count_pos, pack.count_neg], axis=1)[
                pack.segment != PROMPT
            ]
            for pack in packs
        ]
        trained = np.concatenate(columns)
        assert len(trained) > 0
        # Only the order of the sums of the whitening may differ: the file has the trees in another order.
        np.testing.assert_allclose(sorted(shown[step]), sorted(trained.tolist()), rtol=1e-9, atol=1e-12)


def test_a_configuration_of_another_version_costs_the_advantages_alone(tmp_path: Path) -> None:
    lines = [to_json(tree_of([-1, -1], [1.0, 0.0]), step=1)]
    ask = asker(run_of(tmp_path / "run", lines, learning={"estimator": "new"}, other=1))
    ask("rows", **{"from": 0, "mark": ""})
    assert "config.yaml: learning.estimator: " in ask("tree", tree=0)["untrained"]
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    ask = asker(tmp_path / "run")
    ask("rows", **{"from": 0, "mark": ""})
    assert "config.yaml:" in ask("tree", tree=0)["untrained"]


def test_an_exported_page_answers_what_its_script_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 4)
    monkeypatch.setattr(module, "_EXPORTED_TOKENS", 12)
    agreeing, differing = tree_of([-1, -1], [1.0, 1.0], [2, 2]), tree_of([-1, -1], [1.0, 0.0], [2, 2])
    lines = [to_json(tree) for tree in (agreeing, differing) * 5]
    folder = run_of(tmp_path / "run", [*lines, b"null\n"])
    part = trees_part(find_sources([folder]))
    answers = {}
    for question, query in part.exported():
        (folder / "trees.jsonl").write_bytes(b"".join(lines * 3))  # a run goes on
        answers[question, *sorted(query.items())] = part.answers[question](query)

    def ask(question: str, **query: object) -> Any:
        return answers[question, *sorted({"source": "0", **{k: str(v) for k, v in query.items()}}.items())]

    start, mark, more = 0, "", True
    while more:
        rows = ask("rows", **{"from": start, "mark": mark})
        start, mark, more = start + len(rows["columns"]["step"]), rows["mark"], rows["more"]
    assert start == 11
    assert len(ask("prompts")["questions"]) == 1
    trees = [dict(key[1:])["tree"] for key in answers if key[0] == "tree"]
    assert trees == ["1", "3", "5"]  # those that differ, up to 12 tokens
    for tree in trees:
        assert [len(ask("text", tree=tree, node=node, **{"from": 0})["texts"]) for node in range(3)] == [
            2,
            2,
            2,
        ]


def test_an_evaluations_trees_of_a_run_are_not_trained(model: Path, tmp_path: Path) -> None:
    line = to_json(tree_of([-1, 0, 0], [0.0, 1.0]), step=1, set="math", answer="2")
    run = run_of(tmp_path / "run", [line], model={"path": str(model)}, learning={})
    (run / "heldout_trees.jsonl").write_bytes(line)
    untrained = []
    for path in (run, run / "heldout_trees.jsonl"):
        ask = asker(path)
        ask("rows", **{"from": 0})
        untrained.append(ask("tree", tree=0)["untrained"])
    assert untrained == [None, "the tree is an evaluation's, which no step has trained"]
