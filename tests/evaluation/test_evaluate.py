"""The evaluation's loop against a random server: files, failures, and the next command."""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fake_engine import EOS, FakeEngine
from tests.support.sglang_http import FakeServer
from tests.support.tiny import write_tiny_qwen2
from treepo.cli.evaluate import evaluation_engines
from treepo.config.evaluate import EvalConfig
from treepo.errors import EngineError, RewardError
from treepo.evaluation.evaluate import evaluate
from treepo.evaluation.metrics import ProblemResult
from treepo.preflight.inputs import read_evaluation_inputs
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.stats import Stats
from treepo.toy.byte_tokenizer import byte_tokenizer

PROBLEMS, SAMPLES = 8, 4


TOKENIZER = byte_tokenizer(max_tokens=1024)


class Answering(FakeEngine):
    """Boxes 0, 1 or 2 by the seed, and ends; refuses a prompt that ends in a character of `silent`."""

    def __init__(self, silent: str = "") -> None:
        super().__init__()
        self.silent = tuple(silent)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        self.requests.append(request)
        if TOKENIZER.decode(request.context).endswith(self.silent):
            raise EngineError("no")
        answer = TOKENIZER.encode(rf"\boxed{{{request.seed % 3}}}")
        tokens = np.append(answer, np.int32(EOS))
        return GenerateOutput(tokens, np.zeros(len(tokens), np.float32), 0, "eos", len(request.context) - 1)


class Seen:
    """A `Reporter` that remembers."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.results: list[ProblemResult | None] = []

    def starting(self) -> None:
        self.starts.append("starting")

    def sampling(self, problems: int, finished: int) -> None:
        self.starts.append(f"{finished}/{problems}")

    def problem(self, result: ProblemResult | None, stats: Stats, seconds: float) -> None:  # noqa: ARG002
        self.results.append(result)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_qwen2(folder / "model", vocab_size=512, eos_token_id=EOS)
    byte_tokenizer(max_tokens=1024).hugging_face.save_pretrained(folder / "model")
    rows = [{"prompt": f"problem {index}", "answer": index % 3} for index in range(PROBLEMS)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, out: Path, url: str, **changes: Any) -> EvalConfig:
    columns = {"answer": "answer", "source": None}
    return EvalConfig.model_validate(
        {
            "out": str(out),
            "model": {"url": url, "tokenizer": str(folder / "model")},
            "data": {
                "benchmarks": [{"path": str(folder / "p.jsonl"), "columns": columns}],
                "max_prompt_tokens": 64,
            },
            "sampling": {"width": SAMPLES, "max_response_tokens": 64, "attempts": 2, "retry_seconds": 0},
            "reward": {"workers": 1},
        }
        | changes
    )


Outcome = dict[str, Any] | EngineError | RewardError


def evaluations(folder: Path, out: Path, *engines: FakeEngine, **changes: Any) -> list[tuple[Outcome, Seen]]:
    """Run the same command once for each engine; return its outcomes and reports."""

    async def work() -> list[tuple[Outcome, Seen]]:
        server = FakeServer(FakeEngine(), weight_version="0")
        config = settings(folder, out, await server.start(), **changes)
        done: list[tuple[Outcome, Seen]] = []
        try:
            inputs = await asyncio.to_thread(read_evaluation_inputs, config)
            start = partial(evaluation_engines, config, inputs)
            for server.engine in engines:
                seen = Seen()
                try:
                    done.append((await evaluate(config, inputs, seen, start), seen))
                except (EngineError, RewardError) as error:
                    done.append((error, seen))
        finally:
            await server.close()
        return done

    return asyncio.run(work())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_failed_problem_is_reported_and_the_next_command_tries_it_again(
    folder: Path, tmp_path: Path
) -> None:
    first, second, third = Answering(silent="25"), Answering(), Answering()
    (before, seen), (after, again), (last, idle) = evaluations(folder, tmp_path, first, second, third)
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert sorted(before["failures"]) == ["p:2", "p:5"]
    assert "503 Service Unavailable" in before["failures"]["p:2"]
    assert seen.results.count(None) == 2
    assert (before["overall"]["finished"], before["overall"]["problems"]) == (PROBLEMS - 2, PROBLEMS)
    assert before["cost"]["failed_requests"] > 0

    assert after["failures"] == {}
    assert again.starts == ["starting", f"{PROBLEMS - 2}/{PROBLEMS}"]
    assert len(second.requests) == 2 * SAMPLES
    assert after["cost"]["sessions"] == 2
    assert [row["id"] for row in after["problems"]] == [f"p:{index}" for index in range(PROBLEMS)]
    assert (last, idle.starts, third.requests) == (after, [], [])


def test_the_files_agree_with_each_other_and_with_the_grader(folder: Path, tmp_path: Path) -> None:
    ((results, _),) = evaluations(folder, tmp_path, Answering())
    assert isinstance(results, dict)
    samples = lines(tmp_path / "samples.jsonl")
    assert len(samples) == PROBLEMS * SAMPLES
    for sample in samples:
        assert sample["text"] == rf"\boxed{{{sample['answer']}}}"
        assert (sample["verdict"] == "correct") == (sample["answer"] == sample["gold"])
        assert sample["stop"] == "boxed"
    for row in results["problems"]:
        own = [sample for sample in samples if sample["problem"] == row["id"]]
        correct = sum(sample["verdict"] == "correct" for sample in own)
        assert row["metrics"]["mean"] == correct / SAMPLES
        answers = [sample["answer"] for sample in own]
        most = max(map(answers.count, answers))
        ahead = {answer for answer in answers if answers.count(answer) == most}
        assert row["metrics"]["majority"] == pytest.approx((own[0]["gold"] in ahead) / len(ahead))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["settings"]["sampling"]["width"] == SAMPLES
    assert results["cost"]["decoded_tokens"] == results["overall"]["tokens"]["total"]
    assert results["cost"]["prefilled_tokens"] == PROBLEMS * SAMPLES, "all but one token of each was cached"


def test_without_any_answer_the_command_fails_and_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    (failed, _), (results, seen) = evaluations(folder, tmp_path, Answering(silent="01234567"), Answering())
    assert "no problem could be finished; the last: " in str(failed)
    assert isinstance(results, dict)
    assert seen.starts == ["starting", f"0/{PROBLEMS}"]


def test_a_reward_of_the_users_own_has_no_votes(folder: Path, tmp_path: Path) -> None:
    own = {"workers": 1, "function": "tests.support.reward_functions:length_and_match"}
    ((results, _),) = evaluations(folder, tmp_path, Answering(), reward=own)
    assert isinstance(results, dict)
    samples = lines(tmp_path / "samples.jsonl")
    right = [sample["gold"] in sample["text"] for sample in samples]
    assert [sample["reward"] for sample in samples] == right
    assert results["overall"]["metrics"]["mean"]["value"] == sum(right) / len(right)
    assert samples[0]["terms"]["response_length"] == len(samples[0]["text"])
    assert not [name for name in results["overall"]["metrics"] if name.startswith("maj")]
    assert "report.html" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("share", "stops"), [(0.2, True), (1.0, False)])
def test_a_problem_that_could_not_be_graded_is_not_finished(
    folder: Path, tmp_path: Path, share: float, stops: bool
) -> None:
    """`obey` raises LookupError for an unknown action, so no response is graded."""
    own = {"workers": 1, "function": "tests.support.reward_functions:obey", "max_failed_share": share}
    ((failed, seen),) = evaluations(folder, tmp_path, Answering(), reward=own)
    assert isinstance(failed, RewardError if stops else EngineError)
    assert (
        f"{PROBLEMS * SAMPLES} of {PROBLEMS * SAMPLES}" in str(failed)
        if stops
        else "could be graded" in str(failed)
    )
    assert seen.results == [None] * PROBLEMS
    assert lines(tmp_path / "samples.jsonl") == []
