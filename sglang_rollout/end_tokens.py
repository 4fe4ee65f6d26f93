"""The tokens at which a model ends a sequence."""

import json
from pathlib import Path

from treepo.errors import ModelError


def end_tokens(model: Path) -> frozenset[int]:
    """Ids named as end of sequence by config.json, generation_config.json or the tokenizer.

    The three differ on purpose in published models: a chat model's generation config lists the end of a
    turn and the end of a text, its tokenizer only the first. Raises ModelError where none is named.
    """
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        file = model / name
        if file.exists():
            named = json.loads(file.read_text()).get("eos_token_id")
            ids.update(named if isinstance(named, list) else [] if named is None else [named])
    if (model / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        named = AutoTokenizer.from_pretrained(model, local_files_only=True).eos_token_id
        ids.update([] if named is None else [named])
    if not ids:
        raise ModelError(f"{model}: neither configuration nor tokenizer names an end-of-sequence token")
    return frozenset(ids)
