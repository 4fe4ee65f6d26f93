"""Make the toy: a folder of small problems, and a small model that solves about two in five of them.

    out/model           a Hugging Face folder (Qwen2 or Qwen3-MoE, float32) with a byte-level tokenizer
    out/train.jsonl     problems in the columns of m-a-p/TreePO_data
    out/heldout.jsonl   further problems, which neither the warm start nor train.jsonl contains
    out/toy.json        written last: the fingerprint of the toy's recipe and code, and the report

The data depend on the seed alone. So does the model on one kind of processor; on another, float32 sums round
differently.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

from treepo.errors import ConfigError
from treepo.rollout import rng
from treepo.toy.recipe import RECIPE, Recipe

_STAMP = "toy.json"


@dataclass(frozen=True, slots=True)
class ToyReport:
    """The toy that `make_toy` made in `seconds`, or found already made (cached)."""

    model: Path
    train: Path
    heldout: Path
    family: str  # the model's, for people
    parameters: int
    sampled_accuracy: float  # at temperature 1, on the held-out problems
    seconds: float
    cached: bool


def make_toy(
    out: Path,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    recipe: Recipe = RECIPE,
) -> ToyReport:
    """Make the toy in the folder `out`, or return the one that is there unless `force` is set.

    progress: called with (step, steps, loss) after each step of the warm start. Raises ConfigError if `out`
    is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: it is a file; the toy needs the path of a folder, new or existing")
    fingerprint = _fingerprint(seed, recipe)
    if not force:
        report = _read_stamp(out, fingerprint, recipe)
        if report is not None:
            return report
    (out / _STAMP).unlink(missing_ok=True)
    report = _make(out, seed, recipe, progress)
    _write_stamp(out, fingerprint, report)
    return report


def _make(
    out: Path, seed: int, recipe: Recipe, progress: Callable[[int, int, float], None] | None
) -> ToyReport:
    start = time.monotonic()
    # Imported here: torch takes seconds to load, and a toy that is already made does not need it.
    import torch

    from treepo.toy import problems, warmstart
    from treepo.toy.byte_tokenizer import byte_tokenizer

    draws = rng.generator("toy", seed, "problems")
    drawn = problems.draw_problems(draws, recipe.train_problems + recipe.heldout_problems)
    train, heldout = drawn[: recipe.train_problems], drawn[recipe.train_problems :]
    out.mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", train), ("heldout", heldout)):
        lines = (orjson.dumps(row) + b"\n" for row in problems.rows(chosen, split))
        (out / f"{split}.jsonl").write_bytes(b"".join(lines))

    tokenizer = byte_tokenizer(warmstart.MAX_CONTEXT)
    # On a GPU the warm start takes seconds; on a CPU one to four minutes.
    model = warmstart.new_model(seed, recipe.experts)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    with warmstart.one_thread():
        warmstart.warm_start(model, tokenizer, recipe, seed, frozenset(heldout), progress)
        accuracy = warmstart.sampled_accuracy(model, tokenizer, heldout, recipe.measured_samples, seed)
    model.save_pretrained(out / "model")
    tokenizer.hugging_face.save_pretrained(out / "model")
    return ToyReport(
        model=out / "model",
        train=out / "train.jsonl",
        heldout=out / "heldout.jsonl",
        family=recipe.family,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sampled_accuracy=accuracy,
        seconds=time.monotonic() - start,
        cached=False,
    )


def _fingerprint(seed: int, recipe: Recipe) -> str:
    """Digest what a toy is made from: the seed, the recipe and the sources of this package."""
    digest = hashlib.blake2b(repr((seed, recipe)).encode(), digest_size=16)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _files(out: Path) -> dict[str, int]:
    """The toy's files as they are now: sizes in bytes by name."""
    paths = [out / "train.jsonl", out / "heldout.jsonl", *(out / "model").glob("*")]
    return {str(path.relative_to(out)): path.stat().st_size for path in sorted(paths) if path.is_file()}


def _write_stamp(out: Path, fingerprint: str, report: ToyReport) -> None:
    """Write the stamp whole or not at all; a folder without a stamp is made again."""
    content = {
        "fingerprint": fingerprint,
        "files": _files(out),
        "parameters": report.parameters,
        "sampled_accuracy": report.sampled_accuracy,
        "seconds": report.seconds,
    }
    partial = out / f"{_STAMP}.partial"
    partial.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    partial.replace(out / _STAMP)


def _read_stamp(out: Path, fingerprint: str, recipe: Recipe) -> ToyReport | None:
    """Read the report of the toy in `out`; None if it is incomplete or was made from anything else."""
    if not (out / _STAMP).is_file():
        return None
    try:
        content = orjson.loads((out / _STAMP).read_bytes())
        report = ToyReport(
            model=out / "model",
            train=out / "train.jsonl",
            heldout=out / "heldout.jsonl",
            family=recipe.family,
            parameters=int(content["parameters"]),
            sampled_accuracy=float(content["sampled_accuracy"]),
            seconds=float(content["seconds"]),
            cached=True,
        )
        files = dict(content["files"])
        made = content["fingerprint"] == fingerprint and files.items() <= _files(out).items()
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return report if made else None
