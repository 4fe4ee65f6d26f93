"""The check `trainer`: a real Megatron-Core trainer on a toy model computes the log-probs of a tree and takes
one step, which must raise those of the rewarded answer and lower those of the other.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import numpy as np

from treepo.doctor.check import Outcome, failed, passed

if TYPE_CHECKING:
    from treepo.tree import Tree

_PROMPT, _RESPONSE = 16, 16  # tokens
_PACK_TOKENS = 128
_LEARNING_RATE = 1e-3
_DISAGREES = "trainer and transformers disagree on the same weights: check the versions of the packages"


def trainer() -> Outcome:
    from megatron_bridge.trainer import MegatronTrainer, create_store
    from treepo.config.learning import LearningConfig
    from treepo.config.trainer import OptimizerConfig, TrainerConfig
    from treepo.doctor.toy_model import Toy, max_difference, native_dtype
    from treepo.learning import advantage, loss
    from treepo.learning.packing import pack_trees

    toy, learning = Toy(Path(mkdtemp()), native_dtype()), LearningConfig()
    tree = tree_of_two_answers(toy.tokens)
    (packs,) = pack_trees([tree], advantage.estimate([tree], learning), _PACK_TOKENS, 1)
    optimizer = OptimizerConfig(learning_rate=_LEARNING_RATE, warmup_steps=0)
    trainer = MegatronTrainer(
        toy.folder, toy.dtype, TrainerConfig(optimizer=optimizer), learning, 0, 1, create_store()
    )
    (before,) = trainer.log_probs(packs, 1.0)
    paths = [np.concatenate([tree.prompt, segment.tokens]) for segment in tree.segments]
    expected = np.concatenate([toy.log_probs(path)[_PROMPT - 1 :] for path in paths])
    error = max_difference(before[_PROMPT:], expected)
    if not error <= toy.tolerance:  # a NaN fails too
        return failed(
            f"log-probs differ from transformers' by {error:.2g}, at most {toy.tolerance:g} is allowed",
            _DISAGREES,
        )
    trained = [replace(packs[0], old_log_prob=before)]
    metrics = trainer.train_step(trained, 1.0, loss.denominator([trained], learning))
    (after,) = trainer.log_probs(packs, 1.0)
    trainer.close()
    good, bad = ((after - before)[_PROMPT:].reshape(2, _RESPONSE)).mean(1)
    found = (
        f"log-probs differ from transformers' by {error:.1g} ({toy.dtype}); one step of gradient norm "
        f"{metrics['grad_norm']:.2g} moved the good answer's by {good:+.2g} a token, "
        f"the bad one's by {bad:+.2g}"
    )
    return passed(found) if good > 0 > bad else failed(found, _DISAGREES)


def tree_of_two_answers(tokens: np.ndarray) -> "Tree":
    """One prompt with a rewarded answer and an unrewarded one."""
    from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict

    prompt, good, bad = np.split(tokens, [_PROMPT, _PROMPT + _RESPONSE])
    segments = tuple(
        Segment(
            parent=PROMPT,
            tokens=answer,
            log_probs=np.zeros(len(answer), dtype=np.float32),
            versions=np.zeros(len(answer), dtype=np.int32),
            finish=Finish.LENGTH,
        )
        for answer in (good, bad)
    )
    leaves = (Leaf(0, Stop.LIMIT, 1.0, Verdict.CORRECT), Leaf(1, Stop.LIMIT, 0.0, Verdict.WRONG))
    return Tree("doctor", prompt, segments, leaves)
