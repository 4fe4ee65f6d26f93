"""A model folder's tokenizer: prompts to token ids, responses to text, and the tokens that end a sequence."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treepo.errors import ModelError, one_line

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
Message = Mapping[str, str]


class RefusedMessagesError(ModelError):
    """Messages that the model's chat template refuses, such as a system message."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """hugging_face: the tokenizer of transformers. end_tokens: every id that ends a sequence, ascending."""

    hugging_face: Any
    end_tokens: tuple[int, ...]

    def render(self, messages: Sequence[Message]) -> str:
        """Apply the chat template to the messages and open the assistant's turn: the model's input as text.

        A final assistant message stays open: its text follows the turn that the template opens, as it is.
        Without a chat template (a base model) it is the plain contents of the messages, separated by blank
        lines. Raises RefusedMessagesError for messages that the template refuses, and ModelError for a
        template that is not valid.
        """
        if self.hugging_face.chat_template is None:
            return "\n\n".join(message["content"] for message in messages)
        if messages[-1]["role"] == "assistant":
            return self._continued(messages[:-1], messages[-1]["content"])
        from jinja2 import TemplateError, TemplateSyntaxError  # needed only to apply a template

        try:
            return self.hugging_face.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateSyntaxError as error:
            raise ModelError(
                f"{self.hugging_face.name_or_path}: its chat template is not valid: line {error.lineno}: "
                f"{error.message}"
            ) from error
        # Python raises the latter four if the template adds, looks up or calls something that is not there.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RefusedMessagesError(
                f"the chat template refuses the messages ({roles}): {one_line(error)}"
            ) from error

    def _continued(self, messages: Sequence[Message], begun: str) -> str:
        if not messages:
            raise RefusedMessagesError("the messages (assistant) begin with the answer")
        opened = self.render(messages)
        tag = re.match(r"\s*(<[^<>\s]+>)", begun)
        if tag and opened.rstrip().endswith(tag[1]):
            raise RefusedMessagesError(
                f"the chat template opens the assistant's turn with {tag[1]}, and so does the final message"
            )
        return opened + begun

    def encode(self, text: str) -> np.ndarray:
        """Encode a rendered prompt: int32 [T]. A chat template has written its own special tokens."""
        templated = self.hugging_face.chat_template is not None
        ids = self.hugging_face(text, add_special_tokens=not templated)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode a response; special tokens, such as the end token, are left out."""
        return self.hugging_face.decode([int(token) for token in tokens], skip_special_tokens=True)


def check_model_folder(folder: Path) -> None:
    """Raise ModelError if the folder lacks a model configuration or a tokenizer. Imports nothing heavy."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a Hugging Face model folder is needed")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: it has no config.json, so it is no Hugging Face model folder")
    _read_json(folder / "config.json")
    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: it has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a local model folder. Raises ModelError with the folder and what it lacks."""
    check_model_folder(folder)
    from transformers import AutoTokenizer  # here: it takes seconds, and the command line stays fast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its Rust half raises bare Exceptions, for a broken folder only
        reason = one_line(error)
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {reason[:300]}") from error
    return Tokenizer(tokenizer, end_tokens(folder, tokenizer.eos_token_id))


def end_tokens(folder: Path, tokenizer_eos: int | None = None) -> tuple[int, ...]:
    """Every id that ends a sequence according to generation_config.json, config.json or the tokenizer.

    Ascending. The three differ in practice: a chat model's generation_config.json names its end of turn and
    its end of text, config.json one of the two. Raises ModelError if none of them names any.
    """
    found = set(_ids(tokenizer_eos))
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            config = _read_json(folder / name)
            found.update(_ids(config.get("eos_token_id")))
            found.update(_ids((config.get("text_config") or {}).get("eos_token_id")))
    if not found:
        raise ModelError(
            f"{folder}: no end token: eos_token_id is in none of generation_config.json, config.json "
            "and the tokenizer"
        )
    return tuple(sorted(found))


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content
