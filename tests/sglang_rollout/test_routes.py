"""SGLang's text of routes is read as it was sent, or refused; retracted requests keep their first routes."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_rollout.engine import SGLangEngine
from sglang_rollout.routes import RouteFormat, experts_of
from treepo.config.engine import EngineConfig
from treepo.errors import EngineError, ModelError


def text_of(routes: np.ndarray) -> str:
    return base64.b64encode(routes.tobytes()).decode()


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({}, 0),
        ({"num_experts": None}, 0),
        ({"num_experts": 128}, 128),
        ({"num_local_experts": 8}, 8),
        ({"n_routed_experts": 256, "num_experts": 0}, 256),
    ],
)
def test_the_number_of_experts(config: dict[str, Any], experts: int) -> None:
    assert experts_of(config) == experts


@pytest.mark.parametrize(
    ("experts", "dtype"), [(8, "uint8"), (255, "uint8"), (256, "uint16"), (512, "uint16")]
)
def test_routes_are_read_as_they_were_sent(experts: int, dtype: str) -> None:
    kind = RouteFormat(experts, layers=3, chosen=2)
    sent = np.stack([np.random.default_rng(seed).permutation(experts)[:2] for seed in range(12)])
    sent = sent.reshape(4, 3, 2).astype(dtype)
    np.testing.assert_array_equal(kind.read(text_of(sent), 4), sent, strict=True)
    assert kind.read("", 0).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "returned no routes; those of 4 tokens were requested"),
        (
            text_of(np.zeros((3, 3, 2), np.uint8)),
            "18 bytes of routes; 4 tokens with 2 experts in each of 3 layers",
        ),
        (text_of(np.zeros((4, 3, 2), np.int32)), "96 bytes of routes; .* have 24"),
        (text_of(np.zeros((4, 3, 2), np.uint8)), r"experts \[0, 0\] for a token, which are not 2 different"),
        (text_of(np.tile(np.array([7, 8], np.uint8), (4, 3, 1))), r"not 2 different ones of 8"),
    ],
)
def test_other_routes_are_refused(text: str | None, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        RouteFormat(8, layers=3, chosen=2).read(text, 4)


def test_an_engine_of_a_dense_model_returns_no_routes(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json: this model has no experts.*routing_replay = none"):
        SGLangEngine(tiny_model, "float32", EngineConfig(), seed=0, routes=True)


class Slots:
    """SGLang's record for one request: the row of each of its tokens."""

    def __init__(self) -> None:
        import torch

        self.rows = torch.zeros((30, 2, 3), dtype=torch.int32)

    def get_topk(self, _request: int, length: int, _pool: object, start: int) -> Any:
        return self.rows[start : length - 1].clone()


@pytest.mark.slow  # imports SGLang's scheduler
def test_retractions_keep_what_was_recorded_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of 5 context tokens is retracted without tokens, with 3, at once again, and with 7."""
    import torch

    import sglang_rollout.route_record as record

    slots, hooks = Slots(), {}
    monkeypatch.setattr(record, "get_global_experts_capturer", lambda: slots)
    monkeypatch.setattr(
        record.HookRegistry, "register", lambda target, hook, kind: hooks.update({target: (hook, kind.value)})
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"num_experts": 300, "num_hidden_layers": 2, "num_experts_per_tok": 3})
    )
    record.register_hooks(tmp_path)
    (collected, after), (retracted, before) = hooks.values()
    assert (after, before) == ("after", "before")
    request = SimpleNamespace(
        origin_input_ids=list(range(5)),
        output_ids=[],
        routed_experts=None,
        routed_experts_start_len=4,
        return_routed_experts=True,
        req_pool_idx=0,
    )
    expected = torch.zeros((30, 2, 3), dtype=torch.int32)
    for round_, (tokens, computed) in enumerate([(0, 0), (3, 7), (3, 0), (7, 11), (9, 13)], start=1):
        slots.rows[:] = 299  # of other requests
        slots.rows[:computed] = 10 * round_
        fresh = expected[:computed, 0, 0] == 0
        expected[:computed][fresh] = 10 * round_
        request.output_ids = [0] * tokens
        if round_ < 5:
            assert retracted(req=request, req_to_token_pool=None, tree_cache=None) is None
    request.routed_experts = slots.get_topk(0, 5 + 9, None, 4)
    collected(None, None, request)
    assert request.routed_experts.dtype is torch.uint16
    assert request.routed_experts.tolist() == expected[4:13].tolist()
    assert set(request.routed_experts.flatten().tolist()) == {20, 40, 50}
