"""A model folder's tokenizer: prompts to token ids, responses to text, and the tokens that end a sequence."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treepo.data.bounds import OverTimeError, bounded_memory, bounded_seconds
from treepo.data.model_config import (
    CONFIG,
    GENERATION_CONFIG,
    check_no_pointers,
    read_json_object,
    read_model_config,
    text_config,
    token_ids,
)
from treepo.errors import ModelError, one_line

TOKENIZER_CONFIG = "tokenizer_config.json"
# Each line is a vocabulary of its own: the files that it needs.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tekken.json",),
    ("tiktoken.model",),
)
_JSON_FILES = ("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_RENDER_SECONDS = 10.0
_RENDER_BYTES = 1 << 30
_PROBE = "What is 12 + 34?"
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
        from jinja2 import TemplateSyntaxError  # needed only to apply a template

        try:
            return self.hugging_face.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateSyntaxError as error:
            raise ModelError(
                f"{self.hugging_face.name_or_path}: its chat template is not valid: line {error.lineno}: "
                f"{error.message}"
            ) from error
        except MemoryError:
            raise  # for `render_bounded`
        except Exception as error:  # a template is a program, and may fail in any way
            roles = ", ".join(message["role"] for message in messages)
            raise RefusedMessagesError(
                f"the chat template refuses the messages ({roles}): {one_line(error) or type(error).__name__}"
            ) from error

    def render_bounded(self, messages: Sequence[Message]) -> str:
        """As `render`; a template that needs too long or too much memory is a ModelError.

        Only before anything starts (treepo.data.bounds): messages that have passed once pass again.
        """
        try:
            with bounded_seconds(_RENDER_SECONDS), bounded_memory(_RENDER_BYTES):
                return self.render(messages)
        except OverTimeError:
            much = f"computes for more than {_RENDER_SECONDS:g} s"
        except MemoryError:
            much = f"needs more than {_RENDER_BYTES >> 20} MiB"
        raise ModelError(f"{self.hugging_face.name_or_path}: its chat template {much} for one prompt")

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


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the files of a tokenizer."""
    whole = any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES)
    return whole or any(folder.glob("*.tiktoken"))


def check_vocabulary_files(folder: Path) -> None:
    """Raise ModelError if the folder has no vocabulary. Imports nothing heavy."""
    if not has_tokenizer(folder):
        names = ", ".join(" with ".join(names) for names in _VOCABULARIES)
        beside = f" beside its {TOKENIZER_CONFIG}" if (folder / TOKENIZER_CONFIG).is_file() else ""
        raise ModelError(f"{folder}: it has no vocabulary of a tokenizer{beside} (none of {names})")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a local model folder, whose code is never run.

    Raises ModelError if a file is missing or broken, or if a token is beyond the model's embedding.
    """
    config = read_model_config(folder)
    check_vocabulary_files(folder)
    from transformers import AutoTokenizer  # here: it takes seconds, and the command line stays fast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        probe = tokenizer(_PROBE)["input_ids"]
        again = tokenizer.decode(probe, skip_special_tokens=True)
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # its Rust half raises bare Exceptions, for a broken folder only
        _check_json(folder)
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {reason}; download it again") from error
    if _letters(again) != _letters(_PROBE) or len(again.split()) < len(_PROBE.split()):
        raise ModelError(
            f"{folder}: its tokenizer makes {list(probe)[:20]} of the text {_PROBE!r}, and {again!r} of "
            "these; its files are broken"
        )
    ends = end_tokens(folder, tokenizer.eos_token_id)
    rows = text_config(config).get("vocab_size", config.get("vocab_size"))
    if isinstance(rows, int):
        _check_embedding(folder, vocabulary, ends, rows)
    return Tokenizer(tokenizer, ends)


def _check_json(folder: Path) -> None:
    """Raise ModelError for the first file of the tokenizer that is not even an object of JSON."""
    for name in _JSON_FILES:
        if (folder / name).is_file():
            read_json_object(folder / name)


def _letters(text: str) -> str:
    """The text as far as a tokenizer must keep it: some drop capitals or add spaces."""
    return "".join(text.split()).casefold()


def _check_embedding(folder: Path, vocabulary: Mapping[str, int], ends: Sequence[int], rows: int) -> None:
    """Raise ModelError if a token has no row in the embedding."""
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= rows:
        raise ModelError(
            f"{folder}: its tokenizer has token {last}, {token!r}, but the embedding only {rows} rows "
            f"(vocab_size = {rows} in {CONFIG}); resize the embedding, or remove the tokens beyond it"
        )
    named = [(name, *special) for name in _NAME_ENDS for special in _special_ids(folder / name)]
    for name, key, token in (*named, (TOKENIZER_CONFIG, "eos_token_id", ends[-1])):
        if token >= rows:
            raise ModelError(
                f"{folder / name}: {key} = {token}, but the embedding has only {rows} rows (vocab_size = "
                f"{rows} in {CONFIG})"
            )


_SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")
_NAME_ENDS = (GENERATION_CONFIG, CONFIG)


def end_tokens(folder: Path, tokenizer_eos: int | None = None) -> tuple[int, ...]:
    """Every id that ends a sequence according to generation_config.json, config.json or the tokenizer.

    Ascending. The three differ in practice: a chat model's generation_config.json names its end of turn and
    its end of text, config.json one of the two. Raises ModelError if none of them names any, or if one has
    anything but numbers.
    """
    check_no_pointers(folder)
    found = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in _NAME_ENDS:
        found |= _named_ends(folder / name)
    if not found:
        raise ModelError(
            f"{folder}: no end token: eos_token_id is in none of generation_config.json, config.json "
            "and the tokenizer"
        )
    return tuple(sorted(found))


def _special_ids(path: Path) -> Iterator[tuple[str, int]]:
    """The keys of special tokens in a JSON file, each with an id that it names."""
    content = read_json_object(path) if path.is_file() else {}
    for key in _SPECIAL:
        found = content.get(key)
        for token in found if isinstance(found, list) else [found]:
            if isinstance(token, int):
                yield key, token


def _named_ends(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    config = read_json_object(path)
    return {
        token for part in (config, text_config(config)) for token in token_ids(part.get("eos_token_id"), path)
    }
