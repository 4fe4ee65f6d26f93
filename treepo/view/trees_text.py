"""Texts of single tokens, and the question in a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treepo.data.tokenizer import load_tokenizer
from treepo.errors import ModelError, one_line

_CONTEXT_TOKENS = 8  # before a run of tokens: a character or a word may have begun there
_LONGEST_QUESTION = 400  # characters
_UNFINISHED = "\ufffd"  # bytes of a character that does not end


class TokenTexts:
    """Turns tokens into texts with the tokenizer of a model folder, or into their numbers without one.

    missing: why there is no tokenizer; None if there is one.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """folders: the tokenizer is that of the first folder that has one."""
        self._tokenizer: Any = None
        reasons = [] if folders else ["no configuration beside the trees names a model folder"]
        for folder in folders:
            try:
                self._tokenizer = _load(folder)
                break
            except ModelError as error:
                reasons.append(str(error))
        self.missing = None if self._tokenizer else "; ".join(reasons)

    def texts(self, tokens: np.ndarray, context: np.ndarray) -> list[str]:
        """The text that each token adds: [T]. A character's text is that of its last token.

        context: the tokens before them, of which the last few are used.
        """
        if self._tokenizer is None:
            return [_number(token) for token in tokens.tolist()]
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        texts: list[str] = []
        unfinished = 0
        before = context[-_CONTEXT_TOKENS:].tolist()
        for token in [*before, *tokens.tolist()]:
            if token < 0 or self._tokenizer.id_to_token(token) is None:
                text = _number(token)
            else:
                text = stream.step(self._tokenizer, token)
            unfinished = unfinished + 1 if text is None else 0
            texts.append(text or "")
        texts = texts[len(before) :]
        for index in range(max(len(texts) - unfinished, 0), len(texts)):
            texts[index] = _UNFINISHED
        return texts

    def decode(self, prompts: Sequence[np.ndarray]) -> list[str]:
        """The texts of whole prompts, special tokens included. Needs a tokenizer."""
        known = [prompt[prompt >= 0].tolist() for prompt in prompts]
        return self._tokenizer.decode_batch(known, skip_special_tokens=False)


def questions(prompts: Sequence[str]) -> list[str]:
    """What is between the lines and special tokens that all prompts begin and end with, shortened."""
    several = len(set(prompts)) > 1
    before = _common_beginning(prompts) if several else ""
    after = _common_beginning([prompt[::-1] for prompt in prompts])[::-1] if several else ""
    start = 1 + max(before.rfind(end) for end in "\n>")
    stop = min((place for place in map(after.find, "\n<") if place >= 0), default=len(after)) - len(after)
    return [_shortened(prompt[start : len(prompt) + stop].strip() or prompt) for prompt in prompts]


def _common_beginning(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)
    return next((least[:place] for place, one in enumerate(least) if one != most[place]), least)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_QUESTION else f"{text[:_LONGEST_QUESTION]} ..."


def _number(token: int) -> str:
    return f"\u27e8{token}\u27e9"


def _load(folder: Path) -> Any:
    """The tokenizer of the library tokenizers. Raises ModelError."""
    from tokenizers import Tokenizer  # here, as below: `treepo --help` is fast

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # its Rust raises bare Exceptions, for a broken file only
            raise ModelError(f"{path}: not a tokenizer: {one_line(error)[:300]}") from None
    tokenizer = load_tokenizer(folder).hugging_face
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"{folder}: its tokenizer has no fast version, which the page needs")
    return tokenizer.backend_tokenizer
